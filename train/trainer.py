"""A run by MaxText's own loop, from its plan to its last checkpoint."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from moeconv_train import feed as feeds
from moeconv_train import run_dir, stopping
from moeconv_train.data.records import write_bytes
from moeconv_train.explain import explained
from moeconv_train.logs import wandb
from moeconv_train.logs.console import LOG_NAME, logged
from moeconv_train.logs.metrics import Metrics, install
from moeconv_train.logs.progress import Progress
from moeconv_train.model_size import peak
from moeconv_train.plan import Plan
from moeconv_train.preflight import patches
from moeconv_train.preflight.target import environment
from moeconv_train.run_dir import Resume
from moeconv_train.sidecar import public_config, write_sidecar
from moeconv_train.words import first_line
from pydantic import BaseModel

from moeconv.errors import ConfigError, MissingPackageError, TrainingError
from moeconv.hub.plot import draw_losses
from moeconv.maxtext.run_record import read_run
from moeconv.maxtext.sidecar import RunFacts, RunSidecar
from moeconv.orbax.locate import locate
from moeconv.printing import Printable

PLOT = "loss.png"
_TOLD = {"language", "license", "tokenizer_license", "data_license", "hub_repo"}

Status = Literal["finished", "interrupted", "time limit", "stopped"]


class Outcome(Printable, BaseModel):
    """How a run went.

    Attributes:
        status: `finished`: all its steps are done; `stopped`: MaxText itself ended it.
        start_step: Steps that were done before this process.
        completed: Steps that are done now.
        saved_step: The newest checkpoint (its number is the step's, from 0).
    """

    status: Status
    run_dir: str
    start_step: int
    completed: int
    steps: int
    saved_step: int | None
    seconds: float
    loss: float | None = None
    eval_loss: float | None = None
    tokens: int | None = None
    message: str | None = None

    @property
    def reached(self) -> str:
        """How far the run has come, and what is saved of it."""
        early = " before the time limit" if self.status == "time limit" else ""
        saved = "" if self.saved_step is None else f", checkpoint {self.saved_step} saved"
        return f"{self.run_dir}: {self.completed:,} of {self.steps:,} steps{early}{saved}"

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv train --json` prints."""
        return self.model_dump()

    def parts(self) -> Iterator[str]:
        """What `moeconv train` prints once all steps are done; nothing before."""
        if self.status != "finished":
            return
        losses = {"loss": self.loss, "validation loss": self.eval_loss}
        shown = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
        yield ", ".join([self.reached, *shown])
        yield f"next: moeconv convert {self.run_dir} OUT"


def train(
    plan: Plan,
    *,
    resume: Resume = "auto",
    note: Callable[[str], None],
    quiet: bool = False,
    begun: float | None = None,
) -> Outcome:
    """Trains what the plan says; a second call goes on where the first one stopped.

    Args:
        plan: With its data prepared and its preflight passed.
        resume: `never` refuses a directory that holds a run.
        note: Takes sentences for people, before MaxText has the terminal.
        quiet: Without progress.
        begun: Since when the time limit counts (time.monotonic), by default since now.

    Raises:
        KeyboardInterrupt: A signal came before the first step, or a second one.
        MoeconvError: See docs/exit-codes.md.
    """
    begun = time.monotonic() if begun is None else begun
    directory = plan.run_dir
    with contextlib.ExitStack() as stack:
        stack.enter_context(run_dir.locked(directory))
        saved = run_dir.check_new(directory, resume)
        before = run_dir.read_sidecar(directory)
        if saved is not None and (done := saved + 1) >= plan.steps:
            for text in _check_finished(plan, before, done):
                note(f"note: {text}")
            note(f"{directory}: all {plan.steps:,} steps are trained already")
            return Outcome(
                status="finished",
                run_dir=str(directory),
                start_step=done,
                completed=done,
                steps=plan.steps,
                saved_step=saved,
                seconds=time.monotonic() - begun,
            )
        stack.enter_context(environment(plan))
        log = directory / LOG_NAME
        note(f"log: {log}")
        stream = stack.enter_context(logged(log))
        progress = Progress(None if quiet else stream, plan.steps)
        stopper = stopping.Stopper(plan.run.time_limit, progress.note, begun=begun)
        stack.enter_context(stopper.handling())
        progress.note("importing MaxText and compiling the step, which take a minute or more")
        with explained(log, directory):
            config, recorder = initialize(plan)
            if saved is not None:
                now = public_config(config.get_keys())
                for text in run_dir.check_same(directory, before, now, _facts(plan)):
                    progress.note(f"note: {text}")
                progress.note(f"going on after step {saved + 1:,} of {plan.steps:,}")
            _write_sidecar(plan, config)
            progress.peak = _peak(plan)
            metrics = Metrics(directory, progress, plan.run.loss_scale.patience)
            stack.callback(metrics.close)
            try:
                _run(plan, config, recorder, metrics, stopper, progress.note)
            finally:
                _plot(directory, progress.note)
        if stopper.no_batch and (plan.feed.kind, stopper.no_batch) != ("hf", "ended"):
            raise TrainingError(
                f"{directory}: the data ended after {metrics.completed:,} of {plan.steps:,} steps "
                f"({stopper.message}); set steps={metrics.completed}"
            )
        early = metrics.completed < plan.steps
        return Outcome(
            status=(stopper.reason or "stopped") if early else "finished",
            run_dir=str(directory),
            start_step=metrics.start_step,
            completed=metrics.completed,
            steps=plan.steps,
            saved_step=run_dir.saved_step(directory),
            seconds=round(time.monotonic() - begun, 3),
            loss=metrics.loss,
            eval_loss=metrics.eval_loss,
            tokens=metrics.tokens,
            message=stopper.message if early else None,
        )


def _check_finished(plan: Plan, before: RunSidecar | None, done: int) -> list[str]:
    """Compares what is asked for with a run that has all its steps; MaxText is not started for it.

    Raises:
        ConfigError: It is another run, or a shorter one.
    """
    asked = public_config(plan.told)
    notes = run_dir.check_same(plan.run_dir, before, asked, _facts(plan))
    if done > plan.steps:
        raise ConfigError(
            f"{plan.run_dir}: has {done:,} steps already, more than steps={plan.steps}; "
            f"give steps={done}, or begin a new run_name"
        )
    return notes


def initialize(plan: Plan) -> tuple[Any, Any]:
    """MaxText's config and recorder, as its own `main` makes them.

    Raises:
        ConfigError: MaxText refuses the config, or counts a step's rows in another way.
        MissingPackageError: See `on_gpu`.
    """
    from absl import flags
    from absl import logging as absl_logging
    from maxtext.trainers.pre_train import train as maxtext

    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["moeconv"])  # absl's, which grain's workers read
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        # MaxText sets XLA's flags before the first look at the devices; JAX reads them once.
        with on_gpu() if plan.config["hardware"] == "gpu" else contextlib.nullcontext():
            config, recorder = maxtext.initialize(plan.argv())
    # pyconfig.py `_handle_config_exception` exits; where unittest is loaded, it raises.
    except (SystemExit, ValueError, TypeError) as error:
        why = error.__context__ if isinstance(error, SystemExit) else error
        raise ConfigError(f"MaxText refuses this config: {first_line(why)}") from None
    counted = int(config.global_batch_size_to_load)
    if plan.steps_per_epoch and counted != plan.batch:
        raise ConfigError(
            f"MaxText loads {counted} rows a step on the devices it finds, and {plan.batch} were "
            f"expected: the mesh of this config spans {plan.target.devices} devices"
        )
    return config, recorder


@contextlib.contextmanager
def on_gpu() -> Iterator[None]:
    """Around JAX's first look at the devices: nobody wants the GPU's run on the CPU, for a year.

    Raises:
        MissingPackageError: JAX has no GPU; with the reason, which JAX itself only logs where a
            plugin does not load (xla_bridge.py `discover_pjrt_plugins`).
    """
    reasons: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if record.exc_info:
            reasons.append(f": its CUDA plugin does not load: {first_line(record.exc_info[1])}")
        return True

    bridge = logging.getLogger("jax._src.xla_bridge")
    bridge.addFilter(keep)
    try:
        yield
    except RuntimeError:
        if _platform() == "gpu":
            raise
    finally:
        bridge.removeFilter(keep)
    if (platform := _platform()) != "gpu":
        raise MissingPackageError(
            f"hardware=gpu: JAX computes on {platform}, not on the GPU{''.join(reasons)}; leave "
            'JAX_PLATFORMS unset, and in the checkout pip install ".[train,cuda12]"'
        )


def _platform() -> str:
    import jax

    try:
        return jax.devices()[0].platform
    except RuntimeError as error:  # JAX has no such backend
        return f"none ({first_line(error)})"


def _facts(plan: Plan) -> RunFacts:
    """What the sidecar says of a run."""
    dataset = plan.feed.dataset
    return RunFacts(
        dataset=feeds.hub_id(plan.feed),
        dataset_digest=dataset.digest if dataset else None,
        **plan.run.model_dump(include=_TOLD),
        epochs=round(plan.epochs, 6) if plan.epochs else None,
        steps=plan.steps,
        tokens_per_step=plan.tokens_per_step,
        patches=plan.patches,
        loss_scaled=plan.scales_loss,
        source_digest=plan.source_digest,
    )


def _write_sidecar(plan: Plan, config: Any) -> None:
    data = None
    if dataset := plan.feed.dataset:
        manifest = dataset.manifest.model_dump(mode="json", exclude={"shards"})
        data = {"digest": dataset.digest, **manifest}
    write_sidecar(config.get_keys(), feeds.sample(plan.feed), run=_facts(plan), data=data)


def _peak(plan: Plan) -> float | None:
    """Tokens a second at the peak of the devices; None where model or devices are not known."""
    import jax

    size, devices = plan.size, jax.devices()
    each = peak(devices[0].device_kind, str(plan.config["dtype"]))
    return None if size is None or each is None else each * len(devices) / size.flops


def _run(
    plan: Plan,
    config: Any,
    recorder: Any,
    metrics: Metrics,
    stopper: stopping.Stopper,
    note: Callable[[str], None],
) -> None:
    """MaxText's loop, with everything around it that it lacks."""
    from maxtext.trainers.pre_train import train as maxtext

    with contextlib.ExitStack() as stack:
        stack.enter_context(patches.trainer(**plan.patches))
        stack.enter_context(stopping.install(stopper))
        stack.enter_context(install(metrics))
        stack.enter_context(plan.feed.reading())
        if config.enable_wandb:
            entity = plan.run.wandb.entity
            stack.enter_context(wandb.logged(plan.run_dir, config, entity, note))
        maxtext.run(config, recorder)


def _plot(directory: Path, note: Callable[[str], None]) -> None:
    """The losses up to the last checkpoint, as a model card has them; never a reason to fail."""
    try:
        if run_dir.saved_step(directory) is not None:
            record, _ = read_run(locate(str(directory)), None)
            if plot := draw_losses(record):
                write_bytes(directory / PLOT, plot)
    except Exception as error:
        note(f"no plot: {first_line(error)}")
