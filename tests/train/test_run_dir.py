"""The run's directory: who may go on there, and what MaxText raises in one sentence."""

import os
import subprocess
import sys

import pytest
from cli_runner import environment
from moeconv_train import run_dir, trainer
from moeconv_train.explain import explained

from moeconv.errors import ConfigError, OutputError, TrainingError
from moeconv.maxtext.sidecar import RunFacts, RunSidecar


def sidecar(**config):
    facts = RunFacts(dataset_digest="d" * 64)
    return RunSidecar(format="moeconv-run", version=1, config=config, run=facts)


def test_what_may_change_when_a_run_goes_on(tmp_path):
    before = sidecar(steps=10, log_period=1, eval_interval=5, checkpoint_period=2, vocab_size=9)
    now = {**before.config, "steps": 20, "log_period": 3, "eval_interval": 7, "new_key": 1}
    now |= {"checkpoint_period": 4, "enable_wandb": True}
    assert run_dir.check_same(tmp_path, before, now, RunFacts(dataset_digest="d" * 64)) == []
    before = sidecar(remat_policy="full", vocab_size=9)
    (note,) = run_dir.check_same(
        tmp_path,
        before,
        {"remat_policy": "minimal", "vocab_size": 9},
        RunFacts(dataset_digest="d" * 64),
    )
    facts = RunFacts(patches={"fp16_head": True})
    before = RunSidecar(format="moeconv-run", version=1, config={}, run=facts)
    (other,) = run_dir.check_same(tmp_path, before, {}, RunFacts(patches={"fp16_head": False}))
    assert "loss scale and patches were" in other and other.endswith("not to the bit")
    assert run_dir.check_same(tmp_path, before, {}, facts) == []
    assert note == "remat_policy was full and is minimal: the same model, but not to the bit"


def test_another_run_is_refused_by_name(tmp_path):
    before = sidecar(vocab_size=9, learning_rate_schedule_steps=10)
    now = {"vocab_size": 8, "learning_rate_schedule_steps": 20}
    with pytest.raises(ConfigError) as raised:
        run_dir.check_same(tmp_path, before, now, RunFacts(dataset_digest="e" * 64))
    for text in (
        "vocab_size was 9 and is 8",
        "learning_rate_schedule_steps was 10 and is 20",
        "the data's digest was dddddddddddd and is eeeeeeeeeeee",
        "begin a new run_name",
    ):
        assert text in str(raised.value)
    before = RunSidecar(format="moeconv-run", version=1, config={}, run=RunFacts(loss_scaled=True))
    with pytest.raises(ConfigError, match=r"run\.loss_scale\.mode was dynamic, as the checkpoints"):
        run_dir.check_same(tmp_path, before, {}, RunFacts(loss_scaled=False))
    with pytest.raises(ConfigError, match=r"has checkpoints but no moeconv_run\.json"):
        run_dir.check_same(tmp_path, None, now, RunFacts())


def test_a_directory_is_one_processs(tmp_path):
    run = tmp_path / "run"
    with (
        run_dir.locked(run),
        pytest.raises(OutputError, match="another process is training there"),
        run_dir.locked(run),
    ):
        pass
    assert os.listdir(run) == []
    new = tmp_path / "new"
    with pytest.raises(ConfigError), run_dir.locked(new):
        (new / "training.log").touch()
        raise ConfigError("refused")
    assert not new.exists()
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot be written"), run_dir.locked(blocked / "run"):
        pass


def test_the_lock_follows_no_link_and_goes_with_its_holder(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    run.mkdir()
    other.write_text("precious")
    (run / run_dir.LOCK).symlink_to(other)
    with pytest.raises(OutputError, match=r"\.train\.lock is in the way"), run_dir.locked(run):
        pass
    assert other.read_text() == "precious"
    (run / run_dir.LOCK).unlink()
    (run / run_dir.LOCK).touch()  # of a process that was killed
    with run_dir.locked(run):
        (run / "kept").touch()
    assert os.listdir(run) == ["kept"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"format": "moeconv-run"}', "version: Field required"),
        ("[" * 100_000, "it is nested too deeply"),
    ],
)
def test_a_damaged_sidecar_is_named(tmp_path, content, says):
    (tmp_path / "moeconv_run.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"moeconv_run\.json: {says}; begin a new run_name"):
        run_dir.read_sidecar(tmp_path)


def test_a_sidecar_outside_of_the_run_is_not_read(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "run" / "moeconv_run.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"moeconv_run\.json: is a link that leads out"):
        run_dir.read_sidecar(tmp_path / "run")


# As XLA and NCCL say it where JAX has taken all of a GPU's memory.
OUTSIDE = (
    "INTERNAL: NCCL operation ncclCommInitRankConfig(&comm, 2, id, 0, &config) failed: unhandled "
    "cuda error (run with NCCL_DEBUG=INFO for details). Last NCCL warning(error) log entry (may be "
    "unrelated) 'Cuda failure 2 'out of memory''.",
    "INTERNAL: Failed to instantiate CUDA graph: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
    "INTERNAL: failed to create cublas handle: CUBLAS_STATUS_NOT_INITIALIZED",
    "FAILED_PRECONDITION: Could not create cudnn handle: CUDNN_STATUS_ALLOC_FAILED",
)


@pytest.mark.parametrize(
    ("raised", "kind", "told"),
    [
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), TrainingError, "memory is too small"),
        *((RuntimeError(text), TrainingError, "MEM_FRACTION lower than 0.") for text in OUTSIDE),
        (RuntimeError("first\nsecond"), TrainingError, "RuntimeError: first; see "),
        (SystemExit(1), TrainingError, "the loss is no number any more"),
        (SystemExit(1), TrainingError, "abort_on_nan_loss=false"),
        (SystemExit(3), TrainingError, "MaxText ended the process"),
        (TrainingError("gave up"), TrainingError, "gave up"),
        (ConfigError("as it is"), ConfigError, "as it is"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_what_maxtext_and_jax_raise_is_one_sentence(tmp_path, raised, kind, told):
    with pytest.raises(kind) as caught, explained(tmp_path / "training.log", tmp_path):
        raise raised
    assert type(caught.value) is kind
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_plugin_that_does_not_load_is_quoted(tmp_path):
    """JAX logs the reason and takes the CPU; a plugin of ours, as the CUDA plugin might fail."""
    plugin = tmp_path / "jax_plugins" / "broken"
    plugin.mkdir(parents=True)
    (plugin / "__init__.py").write_text(
        "def initialize():\n    raise RuntimeError('Unable to load cuSPARSE.\\nIs it there?')\n"
    )
    code = "import jax; from moeconv_train.trainer import on_gpu\nwith on_gpu(): jax.devices()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(JAX_PLATFORMS="", PYTHONPATH=str(tmp_path)),
        capture_output=True,
        text=True,
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith(
        "MissingPackageError: hardware=gpu: JAX computes on cpu, not on the GPU: its CUDA plugin "
        "does not load: Unable to load cuSPARSE.; leave JAX_PLATFORMS unset, and in the checkout "
        'pip install ".[train,cuda12]"'
    )


def test_a_plot_is_no_reason_to_fail(tmp_path, monkeypatch):
    notes = []
    trainer._plot(tmp_path, notes.append)
    assert notes == [] == os.listdir(tmp_path)  # nothing was saved
    monkeypatch.setattr(run_dir, "saved_step", lambda _: 3)
    trainer._plot(tmp_path, notes.append)
    assert notes[0].startswith("no plot: ") and os.listdir(tmp_path) == []
