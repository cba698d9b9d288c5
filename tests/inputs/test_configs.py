"""What tells a run's settings: YAML, MaxText's own log, W&B's record, and the run's directory."""

import logging

import pytest
import synthetic
import yaml
from inputs_lab import converted, log_of, wandb_of, warnings, yaml_of

from moeconv.arch.config_file import load_config_file
from moeconv.arch.config_sources import from_config_file
from moeconv.errors import ConfigError
from moeconv.maxtext.checkpoint import open_checkpoint


@pytest.fixture(scope="module")
def resolved(maxtext_lab):
    """A whole config as MaxText resolves it; its enums are MaxText's."""
    from checkpoints.mixtral import MIXTRAL

    sizes = {"base_emb_dim": 16, "base_num_query_heads": 4, "base_num_kv_heads": 2, "head_dim": 4,
             "base_mlp_dim": 24, "base_moe_mlp_dim": 24, "vocab_size": 64, "num_experts": 4,
             "logits_via_embedding": True}  # fmt: skip
    return dict(maxtext_lab.checkpoint(MIXTRAL, sizes).resolved)


@pytest.fixture
def made(tmp_path):
    return synthetic.write(tmp_path / "run")


def test_the_line_of_a_yaml_is_said(tmp_path):
    (tmp_path / "team.yml").write_text("rope_max_timescale: 5\n")
    path = tmp_path / "run.yml"
    path.write_text("# a run\nbase_config: team.yml\n\nnum_experts_per_tok: 2\n")
    told = from_config_file(path)
    assert told["num_experts_per_tok"].provenance.detail == f"{path}:4"
    assert told["rope_max_timescale"].provenance.detail == f"{tmp_path / 'team.yml'}:1"


@pytest.mark.parametrize(
    "prefix",
    ["I1126 07:19:42.123456 140000 pyconfig.py:591] ", "INFO:maxtext.configs.pyconfig:", "",
     "2026-11-26T07:19:42Z worker-3 | INFO:absl:", "\x1b[36mINFO\x1b[0m \x1b[1m"],
)  # fmt: skip
def test_maxtexts_log(tmp_path, made, resolved, prefix):
    path = tmp_path / "train.log"
    path.write_text(log_of(resolved, prefix))
    by_log, opened = converted(made, tmp_path / "out", config=path)
    sidecar = tmp_path / "resolved.yml"
    sidecar.write_text(
        yaml.safe_dump({k: made.config.get(k, v) for k, v in load_config_file(path).items()
                        if not isinstance(v, tuple)})
    )  # fmt: skip
    assert by_log == converted(made, tmp_path / "yaml", config=sidecar)[0]
    number = next(
        n for n, line in enumerate(path.read_text().splitlines(), 1)
        if "Config param rope_max_timescale:" in line
    )  # fmt: skip
    assert str(opened.resolution.sources["rope_theta"]) == f"config file: {path}:{number}"
    assert opened.resolution.known["rope_theta"] == 500_000
    assert opened.resolution.known["decoder_block"] == "mixtral"
    assert warnings(opened) == ()


def test_maxtext_logs_what_is_read(tmp_path, maxtext_lab, resolved, caplog):
    """The lines are MaxText's own."""
    import maxtext_lab as lab
    from maxtext.configs import pyconfig

    with caplog.at_level(logging.INFO, logger=pyconfig.logger.name):
        lab._resolve(tmp_path / "run", {**lab.BASE, "decoder_block": "mixtral", "log_config": True})
    path = tmp_path / "train.log"
    path.write_text("\n".join(record.getMessage() for record in caplog.records))
    found = load_config_file(path)
    assert found.resolved and found.whole
    assert len(found) > 800
    told = from_config_file(path)
    assert told["decoder_block"].value == "mixtral"
    assert told["rope_type"].value == "default"
    assert told["mlp_activations"].value == ["silu", "linear"]


@pytest.mark.parametrize("cut", ["head", "tail", "grep"])
def test_of_a_part_of_a_log_nothing_is_filled_in(tmp_path, made, resolved, cut):
    lines = log_of(resolved).splitlines()
    half = next(n for n, line in enumerate(lines) if "param num_experts_per_tok" in line)
    lines = {"head": lines[: half + 1], "tail": lines[half:],
             "grep": [line for line in lines if "rope" in line]}[cut]  # fmt: skip
    path = tmp_path / "part.log"
    path.write_text("\n".join([*lines, ""]))
    opened = open_checkpoint(str(made.run), config=path)
    missing = set(opened.resolution.missing)
    assert ("rope_max_timescale" in missing) == (cut == "head")
    assert ("num_experts_per_tok" in missing) == (cut == "grep")
    assert ("decoder_block" in missing) == (cut != "head")
    assert any("a part of MaxText's log" in warning for warning in warnings(opened))


def test_a_log_of_two_runs_that_differ(tmp_path, made, resolved):
    path = tmp_path / "train.log"
    again = {**resolved, "rope_max_timescale": 10_000, "steps": 77}
    path.write_text(log_of(resolved) + log_of(again))
    with pytest.raises(
        ConfigError,
        match=r"rope_max_timescale has two values, 500000 at .*log:\d+ and 10000 at .*:\d+",
    ):
        open_checkpoint(str(made.run), config=path)
    path.write_text(log_of(resolved) + log_of({**resolved, "steps": 77, "run_name": "b"}))
    assert not open_checkpoint(str(made.run), config=path).resolution.missing


@pytest.mark.parametrize(
    "line",
    ["Config param rope_max_timescale: [[" + "[" * 5000, "Config param x: {'a': __import__('os')}",
     "Config param num_experts_per_tok: " + "9" * 5000],
)  # fmt: skip
def test_hostile_lines_end_in_a_sentence(tmp_path, made, line):
    path = tmp_path / "train.log"
    path.write_text(line + "\n")
    with pytest.raises(ConfigError):
        open_checkpoint(str(made.run), config=path).resolution.model()


def test_w_and_bs_record(tmp_path, made, resolved):
    path = tmp_path / "config.yaml"
    path.write_text(wandb_of(resolved))
    _, opened = converted(made, tmp_path / "out", config=path)
    assert opened.resolution.known["rope_theta"] == 500_000
    assert str(opened.resolution.sources["rope_theta"]).startswith(f"config file: {path}:")


def test_a_record_of_some_settings_is_a_part(tmp_path, made):
    path = tmp_path / "config.yaml"
    path.write_text(wandb_of({"rope_max_timescale": 500_000, "decoder_block": "mixtral"}))
    opened = open_checkpoint(str(made.run), config=path)
    assert "num_experts_per_tok" in opened.resolution.missing
    assert any("a part of W&B's record" in warning for warning in warnings(opened))


PLACES = {
    "a log": ("train.log", log_of),
    "a log in the step": ("checkpoints/0/stdout.txt", log_of),
    "W&B's": ("wandb/run-20260101_0-abc/files/config.yaml", wandb_of),
    "W&B's offline": ("wandb/offline-run-20260101_0-abc/files/config.yaml", wandb_of),
    "resolved YAML": ("config.yml", yaml_of),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_s_directory_is_searched(tmp_path, made, resolved, place):
    name, text = PLACES[place]
    path = made.run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(resolved))
    opened = open_checkpoint(str(made.run))
    assert not opened.resolution.missing
    [said] = [warning for warning in warnings(opened) if "found with the checkpoint" in warning]
    assert str(path) in said
    given = open_checkpoint(str(made.run), config=made.config_file(tmp_path))
    assert not any("found with" in warning for warning in warnings(given))


def test_a_log_is_taken_before_a_record_and_that_before_yaml(made, resolved):
    for place in PLACES:
        name, text = PLACES[place]
        path = made.run / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(resolved))
    said = warnings(open_checkpoint(str(made.run)))
    assert any(f"{made.step_dir / 'stdout.txt'} (MaxText's log)" in each for each in said)


def test_a_yaml_that_a_run_was_started_with_is_not_taken_unasked(made):
    """Its command line is unknown."""
    made.config_file()
    assert "num_experts_per_tok" in open_checkpoint(str(made.run)).resolution.missing


def test_two_logs_that_contradict_each_other(made, resolved):
    (made.run / "a.log").write_text(log_of(resolved))
    (made.run / "b.log").write_text(log_of({**resolved, "rope_max_timescale": 10_000}))
    with pytest.raises(
        ConfigError,
        match=r"rope_max_timescale has .* at .*b.log:\d+ and .* at .*a.log:\d+, .*both files",
    ):
        open_checkpoint(str(made.run))
    (made.run / "b.log").write_text(log_of({**resolved, "steps": 3}))
    assert not open_checkpoint(str(made.run)).resolution.missing


def test_a_link_out_of_the_run_is_not_read(tmp_path, made, resolved):
    (tmp_path / "elsewhere.log").write_text(log_of(resolved))
    (made.run / "train.log").symlink_to(tmp_path / "elsewhere.log")
    assert "rope_max_timescale" in open_checkpoint(str(made.run)).resolution.missing
