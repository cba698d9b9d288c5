"""A YAML made to exhaust or to run code: a sentence and exit code 4, within a second."""

import os
import time

import pytest
import synthetic
from cli_runner import moeconv

from moeconv.errors import ConfigError

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(8)
)
MIXTRAL = "decoder_block: mixtral\n"
# Content, and words of the answer.
ATTACKS = {
    "laughs in a key": (f"{LAUGHS}num_experts_per_tok: *i\n", "alias"),
    "laughs in base_config": (f"{LAUGHS}base_config: *i\n", "alias"),
    "laughs in model_name": (f"{LAUGHS}model_name: *i\n", "alias"),
    "a small alias": ("a: &x 1\nb: *x\n", "alias (*x)"),
    "merged anchors": ("a: &x {b: 1}\nc:\n  <<: *x\n", "alias"),
    "200,000 keys": ("".join(f"key{n}: 1\n" for n in range(200_000)), "larger than"),
    "keys": ("".join(f"rope_max_timescalf{n}: 1\n" for n in range(9_000)), "9000 keys that no"),
    "values": (f"a: [{'1, ' * 150_000}]\n", "more than 20000 keys and values"),
    "deep lists": (f"a: {'[' * 100_000}", "nested more than"),
    "deep mappings": (f"{'{a: ' * 100_000}", "nested more than"),
    "deep dashes": ("- " * 100_000, "nested more than"),
    "a long value": (f"model_name: {'x' * 300_000}\n", "300000 characters"),
    "a long number": (
        f"{MIXTRAL}rope_max_timescale: {'9' * 9_000}\n", "rope_max_timescale=inf (config"),
    "a base 60 number": (
        f"{MIXTRAL}rope_max_timescale: 1{':59' * 3_000}\n", "rope_max_timescale=1:59:59"),
    "a number over 64 bits": (
        f"{MIXTRAL}num_experts_per_tok: 99999999999999999999\n", "should be a whole number"),
    "code": ("a: !!python/object/apply:os.system ['touch pwned']\n", "python/object"),
    "code in a key": ("!!python/name:os.system : 1\n", "python/name"),
    "a key twice": ("rope_max_timescale: 1\nrope_max_timescale: 2\n", "twice"),
    "two documents": ("a: 1\n---\nb: 2\n", "another document"),
    "a NUL": ("a: \0\n", "control characters"),
    "a list": ("- a\n", "no `key: value` lines"),
    "no text": (b"\xff\xfe\x00\xd8", "YAML"),
    "a base that cannot be": ("base_config: \"a\\0b\"\n", "is not at"),
    "a base that is a list": ("base_config: [1, 2]\n", "is not at"),
    "a base that is long": (f"base_config: {'x' * 9_000}\n", "is not at"),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = synthetic.write(tmp_path_factory.mktemp("made") / "run")
    moeconv("inspect", made.run)  # what is imported once is not timed
    return made.run


def refused(run, *arguments):
    begun = time.process_time()
    ran = moeconv("inspect", run, *arguments)
    assert time.process_time() - begun < 1.5
    assert ran.code == ConfigError.exit_code
    assert len(ran.error) < 700, "a sentence"
    return ran.error


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_config(run, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, words = ATTACKS[name]
    path = tmp_path / "run.yml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = refused(run, "--config", path)
    assert words in error and str(path) in error
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["laughs in a key", "deep lists", "code", "a NUL"])
def test_a_hostile_flag(run, name):
    content, _ = ATTACKS[name]
    value = content.partition(": ")[2]
    assert "is not a YAML value" in refused(run, "--set", f"rope_max_timescale={value}")


def test_a_special_file_is_not_waited_for(run, tmp_path):
    fifo = tmp_path / "run.yml"
    os.mkfifo(fifo)
    assert "FIFO" in refused(run, "--config", fifo)
    assert "FIFO, device" in refused(run, "--config", "/dev/zero")
    below = tmp_path / "below.yml"
    below.write_text(f"base_config: {fifo.name}\n")
    assert "base_config run.yml is not at" in refused(run, "--config", below)


def test_a_long_value_is_told_of_in_short(run, tmp_path):
    path = tmp_path / "run.yml"
    path.write_text(f"decoder_block: mixtral\nnum_experts_per_tok: [{'7, ' * 9_000}]\n")
    assert "num_experts_per_tok=[7, 7, 7" in refused(run, "--config", path)


def test_maxtexts_own_files_are_read(run):
    """The largest there is: base.yml, with its anchors, tags and nesting, if it had any."""
    import importlib.util
    from pathlib import Path

    from moeconv.arch.config_sources import load_config_file

    spec = importlib.util.find_spec("maxtext")
    assert spec is not None and spec.submodule_search_locations
    configs = Path(next(iter(spec.submodule_search_locations))) / "configs"
    assert len(load_config_file(configs / "base.yml")) > 500
    for path in sorted((configs / "models").glob("*.yml")):
        assert load_config_file(path), path
