"""All checks of a run, in one call: config traps, network, GPUs, disk, memory of its steps."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from moeconv_train import run_dir
from moeconv_train.logs import wandb
from moeconv_train.preflight import memory as compiled
from moeconv_train.preflight.disk import check_disk
from moeconv_train.preflight.reach import check_reach
from moeconv_train.preflight.report import (
    Finding,
    MemoryReport,
    PreflightReport,
    Status,
    name_of,
)
from moeconv_train.preflight.target import Target
from moeconv_train.preflight.traps import TRAPS, find

from moeconv.errors import ConfigError, MissingPackageError, MoeconvError

if TYPE_CHECKING:
    from moeconv_train.plan import Plan


def preflight(
    plan: "Plan",
    *,
    memory: bool = True,
    online: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> PreflightReport:
    """Checks a run before it starts.

    Args:
        plan: The run.
        memory: Whether to compile its steps, about a minute for each configuration.
        online: Whether to ask the Hub and W&B.
        progress: Told what takes time.

    Returns:
        The findings; apply `mended` over the config, and do not start if any is `refused`.

    Raises:
        ConfigError: MaxText is not installed, or the environment contradicts itself.
    """
    report = PreflightReport(target=plan.target.name, findings=find(plan))
    if not report.findings:
        message = f"None of {len(TRAPS)} known traps."
        report.findings.append(Finding(check="config", status="ok", message=message))
    refused = bool(report.refused)
    if plan.config["enable_wandb"] and (trouble := wandb.missing()):
        off = {"enable_wandb": False}
        report.findings.append(Finding(check="wandb", status="mended", message=trouble, mended=off))
    plan = replace(plan, mended={**plan.mended, **report.mended})
    report.findings += check_reach(plan, online=online)
    on_gpu = plan.config["hardware"] != "cpu"
    if on_gpu:
        report.findings += check_gpus(plan.target, str(plan.config["dtype"]))
    state_bytes = plan.size.state_bytes if plan.size else None
    if memory:
        if refused or not on_gpu:
            why = "put right first what is refused" if refused else "this run is on the CPU"
            finding = Finding(check="memory", status="skipped", message=f"Not compiled: {why}.")
        else:
            finding, report.memory = _memory(plan, progress)
        report.findings.append(finding)
        if report.memory:
            state_bytes = report.memory.rows[0].state_bytes
    report.findings.append(check_disk(plan, state_bytes))
    return report


def check_gpus(target: Target, dtype: str) -> list[Finding]:
    """What there is, against what the run is for, and whether JAX would use it."""
    if target.config_file is not None:
        message = f"No NVIDIA GPU here (nvidia-smi finds none); checked for {target.name}."
        return [Finding(check="gpu", status="note", message=message)]
    status: Status = "warn"
    match target.compute_capability:
        case None:
            says = "nvidia-smi does not know what it can compute"
        case (7, 5):
            status, says = "ok", "FP16 tensor cores, no bfloat16"
        case capability if capability < (7, 0):
            says = "no tensor cores, so FP16 gains little; choose T4 x2"
        case capability if capability < (8, 0):
            says = "not the T4 that the recipe was made for; FP16 works"
        case _ if dtype == "float16":
            says = "has bfloat16, which needs no loss scaling; dtype=bfloat16 is possible"
        case _:
            status, says = "ok", "has bfloat16"
    found = [Finding(check="gpu", status=status, message=f"{target.name}: {says}.")]
    if not compiled.plugin_installed():
        message = (
            "JAX's CUDA plugin is not installed, so it would compute on the CPU; in a checkout of "
            'moeconv: pip install ".[train,cuda12]".'
        )
        code = MissingPackageError.exit_code
        found.append(Finding(check="cuda", status="refused", message=message, exit_code=code))
    return found


def _memory(plan: "Plan", progress: Callable[[str], None]) -> tuple[Finding, MemoryReport | None]:
    """The compiled run, and the settings that would need less if it does not fit."""
    rungs = compiled.ladder(plan.config)
    if run_dir.saved_step(plan.run_dir) is not None:
        rungs = [rung for rung in rungs if all(map(run_dir.may_change, rung))]
    variants = [
        compiled.Variant(name_of(rung) or "as given", rung, plan.patches) for rung in ({}, *rungs)
    ]
    try:
        compiled.plugin_environment()  # or there is nothing to announce
        what = "train and evaluation step" if plan.config["eval_interval"] > 0 else "train step"
        progress(f"compiling the {what} for {plan.target.name}, about a minute")
        report = compiled.measure(
            plan.config, plan.target, variants, until_fit=True, progress=progress
        )
    except MissingPackageError as error:
        message = f"Memory was not checked: {error}."
        return Finding(check="memory", status="warn", message=message), None
    except MoeconvError as error:
        code = ConfigError.exit_code if isinstance(error, ConfigError) else error.exit_code
        message = f"{error}."
        return Finding(check="memory", status="refused", message=message, exit_code=code), None
    return _verdict(report, len(rungs)), report


def _verdict(report: MemoryReport, rungs: int) -> Finding:
    first, last = report.rows[0], report.rows[-1]
    sentence = (
        f"The run needs {first.total / 2**30:.1f} GiB of the "
        f"{first.usable / 2**30:.1f} GiB that JAX takes of each GPU"
    )
    if first.fits and first.xla_rematerialised:
        message = f"{sentence}; XLA recomputes values to get there, which costs time."
        return Finding(check="memory", status="warn", message=message)
    if first.fits:
        return Finding(check="memory", status="ok", message=f"{sentence}.")
    if last.fits:
        fix = f"{last.name} would need {last.total / 2**30:.1f} GiB and trains the same model"
    else:
        fix = f"none of {rungs} settings that save memory is enough; shorten max_target_length"
    return Finding(check="memory", status="refused", message=f"{sentence}; {fix}.")
