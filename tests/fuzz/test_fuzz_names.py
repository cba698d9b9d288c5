"""Any name beside a run's steps, and any --set: a result, or a documented exit code."""

import json
import os
import re
import shutil

import pytest
from harness import SCALE, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import NASTY, YAML, place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600 * SCALE)]

_BOUNDED = settings(
    max_examples=20 * SCALE,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
STEPS = "run/checkpoints"
NAMES = st.one_of(
    st.sampled_from(
        ["8", "0008", "-8", "+8", " 8", "8 ", "8.0", "1e3", "9" * 18, "9" * 30, "9" * 255, "0x8",
         "before_20240101", "step_8", "_8", "8_", "8.orbax-checkpoint-tmp", "8.bak", "items",
         "items.orbax-checkpoint-tmp-8", "moeconv_run.json", "moeconv.json", "٨", "²", "८", "8\n",
         "8\t", "\x1b[31m8", "\x1b]0;x\x07", "\u202e8", "\udcff", "8\udcff", "~", "$HOME",
         "a" * 255, "[red]8", "%s"]
    ),
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
    .filter(lambda name: name not in (".", "..", "7") and len(os.fsencode(name)) < 256),
)  # fmt: skip
KEYS = (
    "num_experts_per_tok", "rope_max_timescale", "decoder_block", "base_emb_dim", "emb_dim",
    "head_dim", "num_experts", "base_num_decoder_layers", "max_target_length", "vocab_size",
    "logits_via_embedding", "normalization_layer_epsilon", "param_scan_axis", "model_name",
    "base_config", "interleave_moe_layer_step", "inhomogeneous_layer_cycle_interval",
    "mlp_activations", "rope_type", "eos_token_id", "bos_token_id", "scan_layers",
    "global_parameter_scale", "nothing_known", "", "=", "a b", "\x1b[31m", "\udcff", "__class__",
)  # fmt: skip


@pytest.mark.parametrize("what", ["copy", "folder", "file", "FIFO", "link out", "link to itself"])
def test_any_name_beside_the_steps(world: World, what: str) -> None:
    """A step is what has a number for a name; nothing else is taken for one."""

    @_BOUNDED
    @given(NAMES)
    def holds(name: str) -> None:
        path = world.folder / STEPS / name
        try:
            if what == "copy":
                shutil.copytree(world.folder / STEPS / "7", path)
            elif what == "folder":
                path.mkdir()
            else:
                path.touch()
                if what != "file":
                    place(path, what, world.secret)
            ended = world.run("inspect json")
            world.run("plan")
        except AssertionError as wrong:
            raise AssertionError(f"{wrong}\nmoeconv inspect run, {name!r} in {STEPS}") from None
        finally:
            world.restore()
        if ended.code == 0:
            newer = what == "copy" and re.fullmatch("[0-9]{1,18}", name) and int(name) > 7
            assert json.loads(ended.out)["step"] == (int(name) if newer else 7), name

    holds()


def _word(text: str) -> str:
    """A value as it comes from a command line, where there is no NUL."""
    return text.replace("\0", "")


@pytest.mark.parametrize("command", ["inspect", "plan", "convert", "inspect folders"])
def test_any_set(world: World, command: str) -> None:
    values = {**NASTY, **YAML}

    @_BOUNDED
    @given(
        st.lists(
            st.tuples(st.sampled_from(KEYS), st.sampled_from(sorted(values))),
            min_size=1,
            max_size=2,
        )
    )
    def holds(pairs: list[tuple[str, str]]) -> None:
        more = [f"--set={key}={_word(values[value])}" for key, value in pairs]
        try:
            world.run(command, more=more)
        except AssertionError as wrong:
            raise AssertionError(f"{wrong}\nmoeconv {command} --set {pairs}") from None
        finally:
            world.restore()

    holds()
