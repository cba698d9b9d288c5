"""A chunk that older Orbax did not store reads as zeros; a lost one must not pass unnoticed."""

import orbax_writer
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models import samples

from moeconv.convert.api import ConvertOptions, convert, plan_conversion


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(samples(dtypes=("float32",)), st.booleans())
def test_whole_chunks_of_zeros_are_warned_about(tmp_path_factory, sample, zero):
    root = tmp_path_factory.mktemp("zeros")
    arrays = {path: array.copy() for path, array in sample.arrays.items()}
    if zero:
        arrays["token_embedder", "embedding"][:5] = 0
    embedding = ("token_embedder", "embedding")
    chunks = {embedding: (5, arrays[embedding].shape[1])}
    step = orbax_writer.write(root / "1", arrays, chunks, zeros=False)
    (root / "config.yml").write_text(yaml.safe_dump(sample.told))
    notes = []
    options = ConvertOptions(
        config=root / "config.yml", sets=(f"param_scan_axis={sample.told['param_scan_axis']}",)
    )
    manifest = convert(plan_conversion(str(step), options), root / "out", note=notes.append)
    warned = any("token_embedder.embedding" in n and "zeros" in n for n in notes)
    assert warned == zero
    told = any("token_embedder.embedding" in w and "zeros" in w for w in manifest.warnings)
    assert told == zero
