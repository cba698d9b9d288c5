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
from moeconv_train.preflight.target import Target, memory_fraction
from moeconv_train.preflight.traps import TRAPS, find

from moeconv.errors import MissingPackageError, MoeconvError, to_install

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
        memory_fraction(plan.patches)  # says what is wrong with it
        report.findings += check_gpus(plan.target, str(plan.config["dtype"]))
    if memory:
        if refused or not on_gpu:
            why = "put right first what is refused" if refused else "this run is on the CPU"
            finding = Finding(check="memory", status="skipped", message=f"Not compiled: {why}.")
        else:
            finding, report.memory = _memory(plan, progress)
        report.findings.append(finding)
    report.findings.append(check_disk(plan))
    return report


def check_gpus(target: Target, dtype: str) -> list[Finding]:
    """What there is, against what the run is for, and whether JAX would use it."""
    if target.config_file is not None:
        message = f"No NVIDIA GPU here (nvidia-smi finds none); checked for {target.name}."
        return [Finding(check="gpu", status="note", message=message)]
    status: Status = "ok"
    capability, says = target.compute_capability, "has bfloat16"
    if capability is None:
        status, says = "warn", "nvidia-smi does not know what it can compute"
    elif capability < (7, 0):
        status, says = "warn", "no tensor cores, so FP16 gains little; choose T4 x2"
    elif not target.has_bf16:
        says = "FP16 tensor cores, no bfloat16"
    elif dtype == "float16":
        status, says = "note", "has bfloat16, which needs no loss scaling: dtype=bfloat16"
    found = [Finding(check="gpu", status=status, message=f"{target.name}: {says}.")]
    if not compiled.plugin_installed():
        why = "JAX's CUDA plugin is not installed, so it would compute on the CPU"
        message = f"{why}; {to_install('train', 'cuda12')}."
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
        message, code = f"{error}.", error.exit_code
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
