"""A run by MaxText's own loop, from its plan to its last checkpoint."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moeconv_train import feed as feeds
from moeconv_train import run_dir, stopping
from moeconv_train.explain import explained
from moeconv_train.logs import logger, wandb
from moeconv_train.logs.console import LOG_NAME, logged
from moeconv_train.logs.plots import write_plot
from moeconv_train.logs.progress import Progress
from moeconv_train.model_size import peak
from moeconv_train.plan import Plan
from moeconv_train.preflight import patches
from moeconv_train.preflight.target import environment
from moeconv_train.run_dir import Resume
from moeconv_train.sidecar import public_config, write_sidecar
from moeconv_train.words import first_line

from moeconv.arch.sidecar import RunFacts, RunSidecar
from moeconv.errors import ConfigError, MissingPackageError, TrainingError

Status = Literal["finished", "interrupted", "time limit", "stopped"]


@dataclass(frozen=True)
class Outcome:
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

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return asdict(self)


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
            seconds = time.monotonic() - begun
            return Outcome("finished", str(directory), done, done, plan.steps, saved, seconds)
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
                notes = run_dir.check_same(directory, before, now, _data(plan), plan.patches)
                for text in notes:
                    progress.note(f"note: {text}")
                progress.note(f"going on after step {saved + 1:,} of {plan.steps:,}")
            _write_sidecar(plan, config)
            records = _records(plan, progress)
            stack.callback(records.close)
            try:
                _run(plan, config, recorder, records, stopper, progress.note)
            finally:
                _plot(directory, progress.note)
        if stopper.no_batch and (plan.feed.kind, stopper.no_batch) != ("hf", "ended"):
            raise TrainingError(
                f"{directory}: the data ended after {records.completed:,} of {plan.steps:,} steps "
                f"({stopper.message}); set steps={records.completed}"
            )
        return _outcome(plan, records, stopper, begun)


def _check_finished(plan: Plan, before: RunSidecar | None, done: int) -> list[str]:
    """Compares what is asked for with a run that has all its steps; MaxText is not started for it.

    Raises:
        ConfigError: It is another run, or a shorter one.
    """
    asked = public_config(plan.told)
    notes = run_dir.check_same(plan.run_dir, before, asked, _data(plan), plan.patches)
    if done > plan.steps:
        raise ConfigError(
            f"{plan.run_dir}: has {done:,} steps already, more than steps={plan.steps}; "
            f"give steps={done}, or begin a new run_name"
        )
    return notes


def _data(plan: Plan) -> run_dir.Data:
    return run_dir.Data(plan.feed.dataset.digest if plan.feed.dataset else None, plan.source_digest)


def _outcome(
    plan: Plan, records: logger.Records, stopper: stopping.Stopper, begun: float
) -> Outcome:
    early = records.completed < plan.steps
    return Outcome(
        status=(stopper.reason or "stopped") if early else "finished",
        run_dir=str(plan.run_dir),
        start_step=records.start_step,
        completed=records.completed,
        steps=plan.steps,
        saved_step=run_dir.saved_step(plan.run_dir),
        seconds=round(time.monotonic() - begun, 3),
        loss=records.loss,
        eval_loss=records.eval_loss,
        tokens=records.file.tokens if records.file else None,
        message=stopper.message if early else None,
    )


def initialize(plan: Plan) -> tuple[Any, Any]:
    """MaxText's config and recorder, as its own `main` makes them.

    Raises:
        ConfigError: MaxText refuses the config, or counts a step's rows in another way.
        MissingPackageError: MaxText is not installed.
    """
    try:
        from absl import flags
        from absl import logging as absl_logging
        from maxtext.trainers.pre_train import train as maxtext
    except ImportError as error:
        raise MissingPackageError(
            f'training needs {error.name}: pip install ".[train]" in the checkout'
        ) from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["moeconv"])  # absl's, which grain's workers read
    absl_logging.set_verbosity(absl_logging.INFO)
    try:
        # MaxText sets XLA's flags before the first look at the devices; JAX reads them once.
        with on_gpu() if plan.config["hardware"] == "gpu" else contextlib.nullcontext():
            config, recorder = maxtext.initialize(plan.argv())
    except SystemExit as error:  # pyconfig.py `_handle_config_exception`
        raise ConfigError(f"MaxText refuses this config: {first_line(error.__context__)}") from None
    except (ValueError, TypeError) as error:  # the same, where unittest is loaded
        raise ConfigError(f"MaxText refuses this config: {first_line(error)}") from None
    counted = int(config.global_batch_size_to_load)
    if plan.steps_per_epoch and counted != plan.batch:
        raise ConfigError(
            f"MaxText loads {counted} rows a step on the devices it finds, and {plan.batch} were "
            f"expected: the mesh of this config spans {plan.devices} devices"
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


def _write_sidecar(plan: Plan, config: Any) -> None:
    dataset, run = plan.feed.dataset, plan.run
    facts = RunFacts(
        dataset=feeds.hub_id(plan.feed),
        dataset_digest=dataset.digest if dataset else None,
        language=run.language,
        license=run.license,
        tokenizer_license=run.tokenizer_license,
        data_license=run.data_license,
        hub_repo=run.hub_repo,
        epochs=round(plan.epochs, 6) if plan.epochs else None,
        steps=plan.steps,
        tokens_per_step=plan.tokens_per_step,
        patches=plan.patches,
        source_digest=plan.source_digest,
    )
    data = None
    if dataset is not None:
        data = {
            "digest": dataset.digest,
            **dataset.manifest.model_dump(mode="json", exclude={"shards"}),
        }
    write_sidecar(config.get_keys(), feeds.sample(plan.feed), run=facts, data=data)


def _records(plan: Plan, progress: Progress) -> logger.Records:
    """Metrics and progress, with the devices' peak where it is known."""
    import jax

    size, devices = plan.size, jax.devices()
    each = peak(devices[0].device_kind, str(plan.config["dtype"]))
    if size is not None and each is not None:
        progress.flops_per_token, progress.peak = size.flops, each * len(devices)
    return logger.Records(plan.run_dir, progress)


def _run(
    plan: Plan,
    config: Any,
    recorder: Any,
    records: logger.Records,
    stopper: stopping.Stopper,
    note: Callable[[str], None],
) -> None:
    """MaxText's loop, with everything around it that it lacks."""
    from maxtext.trainers.pre_train import train as maxtext

    with contextlib.ExitStack() as stack:
        stack.enter_context(patches.trainer(**plan.patches))
        stack.enter_context(stopping.install(stopper))
        stack.enter_context(logger.install(records))
        stack.enter_context(plan.feed.reading())
        if config.enable_wandb:
            entity = plan.run.wandb.entity
            stack.enter_context(wandb.logged(plan.run_dir, config, entity, note))
        maxtext.run(config, recorder)


def _plot(directory: Path, note: Callable[[str], None]) -> None:
    """Never a reason to fail."""
    try:
        write_plot(directory)
    except ImportError:
        note('no plot: matplotlib is not installed (pip install ".[train]")')
    except Exception as error:
        note(f"no plot: {first_line(error)}")
