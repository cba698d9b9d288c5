"""`moeconv families`: the table is that of the pages, and what it says is refused is refused."""

import ast
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import synthetic
from cli_runner import moeconv

from moeconv import families
from moeconv.arch.keys import function_keys
from moeconv.conversion.api import ConvertOptions, plan_conversion
from moeconv.errors import UnsupportedError
from moeconv.families._table import families as table
from moeconv.maxtext.checkpoint import open_checkpoint

RELEASES = ("0.1.0", "0.2.0", "0.2.1", "0.2.2", "0.2.3", "0.2.4", "0.2.5")
REFUSED = [row for row in table().rows if row.status == "refused"]
# A value of each setting that a page refuses.
OTHER = {"engram_layers": [1], "mhc_expansion_rate": 4}


def maxtext_blocks() -> set[str]:
    """Every `decoder_block` of the installed MaxText, read in common/common_types.py."""
    package = importlib.util.find_spec("maxtext").submodule_search_locations[0]
    tree = ast.parse((Path(package) / "common" / "common_types.py").read_text())
    [enum] = [n for n in tree.body if getattr(n, "name", "") == "DecoderBlockType"]
    return {n.value.value for n in enum.body if isinstance(n, ast.Assign)}


def test_every_block_of_maxtext_converts_or_is_refused():
    named = {row.decoder_block for row in table().rows if row.variant is None}
    assert len(named) == sum(row.variant is None for row in table().rows)
    assert maxtext_blocks() <= named
    assert named - maxtext_blocks() == {"llama2_learn_to_init"}  # 0.2.2 alone has it


def test_the_table_is_that_of_the_pages():
    ran = moeconv("families", "--json")
    rows = {row["decoder_block"]: row for row in json.loads(ran.out)["families"]
            if row["status"] == "converts"}  # fmt: skip
    assert (ran.code, ran.err) == (0, "")
    assert rows.keys() == families.blocks().keys()
    for name, block in families.blocks().items():
        assert rows[name]["maxtext"] == block.since
        assert block.since in RELEASES
        goals = [(goal["name"], goal["architecture"], goal["transformers"])
                 for goal in rows[name]["targets"]]  # fmt: skip
        known = families.targets()
        assert goals == [(t, known[t].architecture, known[t].since) for t in block.targets]
    shown = moeconv("families").out
    for word in (*rows, *(row.decoder_block for row in REFUSED), "MixtralForCausalLM", "≥ 0.2.4"):
        assert word in shown


def test_the_way_back_is_said_for_each_target():
    """An architecture whose config.json a page reads becomes the block that has it as a target."""
    read = {each.architecture: each.reading for each in families.targets().values()}
    for row in table().rows:
        assert row.hf_to_maxtext == tuple(
            goal.architecture
            for goal in row.targets
            if (reading := read[goal.architecture]) and row.decoder_block not in reading.unmade
        )


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: f"{row.decoder_block} {row.variant}")
@pytest.mark.parametrize("whole", [True, False], ids=["known arrays", "arrays of its own"])
def test_what_is_refused_is_refused_by_name(tmp_path, row, whole):
    """At convert, plan and inspect, also where its parameters are of no page's layers."""

    def change(arrays):
        if not whole:
            arrays["decoder.layers.of_its_own.kernel"] = np.zeros((16, 4, 3), np.float32)

    block = row.decoder_block if row.variant else "llama2"
    made = synthetic.write(tmp_path / "run", block, change=change)
    told = {"decoder_block": row.decoder_block}
    if row.variant:
        told[row.variant] = OTHER.get(row.variant, True)
        assert not function_keys()[row.variant].is_neutral(told[row.variant])
    config = made.config_file(**told)
    reason = row.reason.removeprefix("it ") if row.variant else row.reason
    name = f"{row.variant}={told[row.variant]}" if row.variant else f"={row.decoder_block} "
    for command in (["convert", made.run, tmp_path / "out"], ["plan"], ["inspect", made.run]):
        if command == ["plan"]:
            with pytest.raises(UnsupportedError) as caught:
                plan_conversion(str(made.run), ConvertOptions(config=config))
            said, code = str(caught.value), UnsupportedError.exit_code
        else:
            ran = moeconv(*command, "--config", config)
            said, code = ran.out + ran.err, ran.code
        assert reason in said and name in said
        shown = command[0] == "inspect" and row.variant and whole
        assert code == (0 if shown else UnsupportedError.exit_code)
        assert not shown or "cannot be converted exactly: " in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["deepseek4-tiny", "envy-test", "deepseek-custom"])
def test_models_that_maxtext_ships_are_refused_by_their_name(tmp_path, name):
    """Their files say what they are; no more need be given."""
    block = "envy" if name.startswith("envy") else "deepseek"
    made = synthetic.write(tmp_path / "run", block, sizes={"E": 8})
    config = tmp_path / "config.yml"
    config.write_text(f"model_name: {name}\nmax_target_length: 64\n")
    made_of_name = {row.reason.removeprefix("it ") for row in REFUSED}
    with pytest.raises(UnsupportedError) as caught:
        plan_conversion(str(made.run), ConvertOptions(config=config))
    assert any(reason in str(caught.value) for reason in made_of_name), caught.value


@pytest.mark.parametrize(
    ("version", "refused"),
    [("0.2.3", True), ("0.2.4", False), ("0.2.4.dev1", False), ("0.10.0", False), (None, False),
     ("a fork", False)],
)  # fmt: skip
def test_a_run_of_an_older_release_is_refused(tmp_path, version, refused):
    """Only its sidecar names a release; MaxText has envy since 0.2.4."""
    made = synthetic.write(tmp_path / "run", "envy")
    sidecar = made.run / "moeconv_run.json"
    content = {"format": "moeconv-run", "version": 1, "config": dict(made.config)}
    sidecar.write_text(json.dumps({**content, "maxtext_version": version}))
    if not refused:
        assert open_checkpoint(str(made.run)).layout.block.name == "envy"
        return
    words = (
        r"moeconv_run.json: maxtext_version=0\.2\.3, but decoder_block=envy.* since MaxText 0\.2\.4"
    )
    with pytest.raises(UnsupportedError, match=words):
        open_checkpoint(str(made.run))
