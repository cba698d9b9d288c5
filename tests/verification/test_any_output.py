"""Whatever the files of OUT hold, verify ends in a report or in one sentence."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import mutations
import numpy as np
import pytest
from harness import SCALE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from outputs_lab import admit

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import MoeconvError
from moeconv.hf.config import to_json
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import CandidateError, Status
from moeconv.verification.models.transformers import HfLayers, HfModel
from moeconv.verification.models.transformers_load import quiet
from moeconv.verification.report.markdown import to_markdown
from moeconv.verification.report.report import Report
from moeconv.verification.run import verify
from moeconv.verification.settings import ParityOptions, VerifyOptions

INDEX, HEADER = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
# Each file of an output and its format.
FORMS = {
    "moeconv_manifest.json": mutations.JSON,
    "config.json": mutations.JSON,
    "generation_config.json": mutations.JSON,
    "tokenizer.json": mutations.JSON,
    "tokenizer_config.json": mutations.JSON,
    INDEX: mutations.JSON,
    HEADER: mutations.SAFETENSORS,
}
PROPERTY = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def good(told, tmp_path_factory):
    """An output of two files, with a tokenizer."""
    out = tmp_path_factory.mktemp("good") / "out"
    options = ConvertOptions(max_shard_bytes=80_000)
    convert(plan_conversion(str(told.parent / "run"), options), out)
    assert {*FORMS} <= {path.name for path in out.iterdir()}
    return out


@pytest.fixture
def fresh(good, tmp_path):
    """Makes copies of it, one at a time."""

    def make() -> Path:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.copytree(good, tmp_path / "out")
        return tmp_path / "out"

    return make


def verdict(out: Path, levels: Sequence[str], **options) -> Status | str:
    """The verdict, or the one sentence that says why there is none."""
    options = VerifyOptions(levels=levels, parity=ParityOptions(tokens=8, **options))
    try:
        report = verify(out, source=None, options=options)
    except MoeconvError as error:
        assert str(error).strip() and "\n" not in str(error), str(error)
        return str(error)
    assert Report.read(to_json(report.model_dump(mode="json"))).verdict is report.verdict
    to_markdown(report, ())
    return report.verdict


@pytest.mark.parametrize("name", FORMS)
def test_a_changed_file_fails_or_is_no_verdict(good, fresh, name):
    # Most changes of the manifest end where it is read, and cost nothing.
    @settings(PROPERTY, max_examples=(60 if name == "moeconv_manifest.json" else 12) * SCALE)
    @given(mutations.content_changes((good / name).read_bytes(), FORMS[name]), st.booleans())
    def holds(changes, admitted):
        out = fresh()
        before = (out / name).read_bytes()
        after = mutations.apply(before, changes, FORMS[name])
        (out / name).write_bytes(after)
        if admitted and name != "moeconv_manifest.json":
            admit(out, name)
        found = verdict(out, ("structure", "weights"))
        if not admitted and name != "moeconv_manifest.json" and after != before:
            # Of names that lead out of the folder nothing is opened at all.
            assert found is Status.FAIL or (name == INDEX and "leads out of" in found)

    holds()


HOOKS = ("attn_implementation", "auto_map", "quantization_config", "kernel_config", "_auto_map")
# Keys that transformers reads beside those of the file, and values of a size that does not matter.
KEYS = (
    "attention_bias", "attention_dropout", "attn_logit_softcapping", "experts_implementation",
    "hidden_act", "id2label", "initializer_range", "is_decoder", "is_encoder_decoder",
    "layer_types", "mlp_bias", "num_labels", "output_attentions", "pad_token_id",
    "per_layer_config", "pruned_heads", "return_dict", "router_jitter_noise", "sub_configs",
    "text_config", "torch_dtype", "use_cache",
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0, 3, 65, 0.5, -0.5, 1e308, "", "nope", "float16", "eager", [], {}, [1],
    [None], ["full_attention"], {"a": 1}, {"rope_type": "yarn"}, {"rope_type": "nope"},
    {"rope_type": "default", "rope_theta": "x"}, [[1, 2], [3]], "flash_attention_2", "\x1b[31m",
)  # fmt: skip


def test_any_config_of_transformers_is_loaded_or_blamed(good, fresh):
    """Past the check of config.json, which would not let any of these through."""
    config = json.loads((good / "config.json").read_text())
    tokens = np.arange(8).reshape(1, 8)

    @settings(PROPERTY, max_examples=30 * SCALE)
    @given(
        st.dictionaries(
            st.sampled_from(sorted({*config, *KEYS, *HOOKS})),
            st.sampled_from(range(len(VALUES))),
            min_size=1,
            max_size=2,
        )
    )
    def holds(changes):
        out = fresh()
        changed = config | {key: VALUES[number] for key, number in changes.items()}
        (out / "config.json").write_text(json.dumps(changed))
        for run in (
            lambda: HfModel.load(out, blame=CandidateError).run(tokens),
            lambda: HfLayers(out, blame=CandidateError).layer(0, HfLayers(out).embed(tokens)),
        ):
            try:
                with quiet():
                    run()
            except MoeconvError as error:
                assert str(error).strip() and "\n" not in str(error), str(error)

    holds()


def test_a_manifest_and_a_config_may_agree_on_nonsense(fresh):
    """Both are written by the same hand, with right digests."""
    numbers = [-1, 0, 1, 3, 5, 7, 65, 2**31 - 1, 0.0, 1e-300, 1e308, -1e308, True, "", "abc", None]
    fields = sorted(json.loads((fresh() / "moeconv_manifest.json").read_text())["model"])

    @settings(PROPERTY, max_examples=12 * SCALE)
    @given(st.sampled_from(fields), st.sampled_from(range(len(numbers))))
    def holds(field, number):
        out = fresh()
        manifest = json.loads((out / "moeconv_manifest.json").read_text())
        manifest["model"][field]["value"] = numbers[number]
        (out / "moeconv_manifest.json").write_text(json.dumps(manifest))
        try:
            wanted = Candidate.open(out).wanted_config
        except MoeconvError:
            return
        (out / "config.json").write_text(json.dumps(wanted))
        admit(out, "config.json")
        verdict(out, ("structure", "weights", "logits"), against=out)

    holds()
