"""A run by MaxText's own loop, from its plan to its last checkpoint."""

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from moeconv_train import feed as feeds
from moeconv_train import run_dir, stopping
from moeconv_train.environment import environment
from moeconv_train.explain import explained
from moeconv_train.logs import logger, wandb
from moeconv_train.logs.console import LOG_NAME, logged
from moeconv_train.logs.metrics import MetricsFile
from moeconv_train.logs.plots import write_plots
from moeconv_train.logs.progress import Progress
from moeconv_train.model_size import peak
from moeconv_train.plan import Plan
from moeconv_train.preflight import patches
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
    loss: float | None
    eval_loss: float | None
    tokens: int | None
    seconds: float
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
        if saved is not None and saved + 1 >= plan.steps:
            for text in _check_finished(plan, before, saved + 1):
                note(f"note: {text}")
            note(f"{directory}: all {plan.steps:,} steps are trained already")
            return _outcome("finished", plan, saved + 1, saved + 1, saved, begun)
        stack.enter_context(environment(plan))
        log = directory / LOG_NAME
        note(f"log: {log}")
        stream = stack.enter_context(logged(log))
        if quiet:
            stream = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
        progress = Progress(stream, plan.steps)
        stopper = stopping.Stopper(plan.run.time_limit, progress.note, begun=begun)
        stack.enter_context(stopper.handling())
        progress.note("importing MaxText and compiling the step, which take a minute or more")
        with explained(log, directory):
            config, recorder = _initialize(plan)
            if saved is not None:
                now = public_config(config.get_keys())
                notes = run_dir.check_same(directory, before, now, _data(plan), plan.patches)
                for text in notes:
                    progress.note(f"note: {text}")
                progress.note(f"going on after step {saved + 1:,} of {plan.steps:,}")
            _write_sidecar(plan, config)
            records = _records(plan, directory, progress)
            stack.callback(records.close)
            try:
                _run(plan, config, recorder, records, stopper, progress.note)
            finally:
                _plots(directory, progress.note)
        if stopper.failure and not (plan.feed.kind == "hf" and stopper.data_ended):
            raise TrainingError(
                f"{directory}: the data ended after {records.completed:,} of {plan.steps:,} steps "
                f"({stopper.failure}); set steps={records.completed}"
            )
        return _end(plan, records, stopper, begun)


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


def _end(plan: Plan, records: logger.Records, stopper: stopping.Stopper, begun: float) -> Outcome:
    status: Status = "finished"
    message = None
    if records.completed < plan.steps:
        reasons: dict[str | None, Status] = {"signal": "interrupted", "time limit": "time limit"}
        status = reasons.get(stopper.reason, "stopped")
        message = stopper.failure or stopper.other
    saved = run_dir.saved_step(plan.run_dir)
    return _outcome(
        status, plan, records.start_step, records.completed, saved, begun, records, message
    )


def _outcome(
    status: Status,
    plan: Plan,
    start: int,
    completed: int,
    saved: int | None,
    begun: float,
    records: logger.Records | None = None,
    message: str | None = None,
) -> Outcome:
    return Outcome(
        status=status,
        run_dir=str(plan.run_dir),
        start_step=start,
        completed=completed,
        steps=plan.steps,
        saved_step=saved,
        loss=records.loss if records else None,
        eval_loss=records.eval_loss if records else None,
        tokens=records.file.tokens if records and records.file else None,
        seconds=round(time.monotonic() - begun, 3),
        message=message,
    )


def _initialize(plan: Plan) -> tuple[Any, Any]:
    """MaxText's config and recorder, as its own `main` makes them.

    Raises:
        ConfigError: MaxText refuses the config, or counts a step's rows in another way.
        MissingPackageError: MaxText is not installed.
    """
    try:
        from absl import flags, logging
        from maxtext.trainers.pre_train import train as maxtext
    except ImportError as error:
        raise MissingPackageError(
            f'training needs {error.name}: pip install "moeconv[train]"'
        ) from None
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["moeconv"])  # absl's, which grain's workers read
    logging.set_verbosity(logging.INFO)
    on_gpu = plan.config["hardware"] == "gpu"
    try:
        config, recorder = maxtext.initialize(plan.argv())
    except SystemExit as error:  # pyconfig.py `_handle_config_exception`
        raise ConfigError(f"MaxText refuses this config: {first_line(error.__context__)}") from None
    except RuntimeError:
        if on_gpu:
            check_gpu()  # JAX has no such backend
        raise
    except (ValueError, TypeError) as error:  # the same, where unittest is loaded
        raise ConfigError(f"MaxText refuses this config: {first_line(error)}") from None
    if on_gpu:
        check_gpu()  # not earlier: MaxText sets XLA's flags, which JAX reads once
    counted = int(config.global_batch_size_to_load)
    if plan.steps_per_epoch and counted != plan.batch:
        raise ConfigError(
            f"MaxText loads {counted} rows a step on the devices it finds, and {plan.batch} were "
            f"expected: the mesh of this config spans {plan.devices} devices"
        )
    return config, recorder


def check_gpu() -> None:
    """Nobody wants the GPU's run on the CPU, where it would take a year.

    Raises:
        MissingPackageError: JAX has no GPU.
    """
    import jax

    try:
        platform = jax.devices()[0].platform
    except RuntimeError as error:
        platform = f"none ({first_line(error)})"
    if platform != "gpu":
        raise MissingPackageError(
            f"hardware=gpu: JAX computes on {platform}, not on the GPU; install its CUDA plugin, "
            'pip install "moeconv[train,cuda12]", and leave JAX_PLATFORMS unset'
        )


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


def _records(plan: Plan, directory: Path, progress: Progress) -> logger.Records:
    """Metrics and progress, with the devices' peak where it is known."""
    import jax

    size, devices = plan.size, jax.devices()
    each = peak(devices[0].device_kind, str(plan.config["dtype"]))
    if size is not None and each is not None:
        progress.flops_per_token, progress.peak = size.flops, each * len(devices)
    return logger.Records(lambda start: MetricsFile(directory, start), progress)


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
            stack.enter_context(wandb.guarded(lambda: public_config(config.get_keys()), note))
        maxtext.run(config, recorder)


def _plots(directory: Path, note: Callable[[str], None]) -> None:
    """Never a reason to fail."""
    try:
        write_plots(directory)
    except ImportError:
        note('no plots: matplotlib is not installed (pip install "moeconv[train]")')
    except Exception as error:
        note(f"no plots: {first_line(error)}")
