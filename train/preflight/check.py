"""All checks of a run, in one call: config traps, network, GPUs, memory, disk."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moeconv_train.preflight import memory as compiled
from moeconv_train.preflight.case import Case
from moeconv_train.preflight.disk import check_disk
from moeconv_train.preflight.reach import check_reach
from moeconv_train.preflight.report import Finding, MemoryReport, PreflightReport
from moeconv_train.preflight.settings import RunSettings
from moeconv_train.preflight.target import LOCAL, Gpu, Target, gpus, local
from moeconv_train.preflight.traps import TRAPS, find

from moeconv.errors import ConfigError, MoeconvError


def preflight(
    config: Mapping[str, Any],
    settings: RunSettings | Mapping[str, Any] | None = None,
    *,
    target: Target = LOCAL,
    memory: bool = True,
    online: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> PreflightReport:
    """Checks a run before it starts.

    Args:
        config: MaxText settings over base.yml (a recipe with its overrides), or a whole resolved
            config (`config.get_keys()`).
        settings: What is not MaxText's; see `RunSettings`.
        target: The GPUs it is for.
        memory: Whether to compile the train step, about half a minute for each configuration.
        online: Whether to ask the Hub and W&B.
        progress: Told what takes time.

    Returns:
        The findings; apply `mended` over the config, and do not start if not `ok`.

    Raises:
        ConfigError: MaxText is not installed.
    """
    known = RunSettings.of(settings or {})
    found = gpus()
    here = local(found) if target == LOCAL and found else target
    case = Case.of(config, known, here)
    trapped = find(case)
    mended = {key: value for finding in trapped for key, value in finding.mended.items()}
    case = replace(case, config={**case.config, **mended})
    report = PreflightReport(target=here.name, findings=trapped)
    if not any(finding.status in ("refused", "mended", "warn") for finding in trapped):
        message = f"None of {len(TRAPS)} known traps."
        report.findings.append(Finding(check="config", status="ok", message=message))
    report.findings += check_reach(case, online=online)
    on_cpu = case["hardware"] == "cpu"
    if not on_cpu:
        report.findings.append(check_gpus(found, here))
    if case["hardware"] == "gpu" and found and not compiled.plugin_installed():
        message = (
            "JAX's CUDA plugin is not installed, so it would compute on the CPU: "
            'pip install "moeconv[train,cuda12]".'
        )
        report.findings.append(Finding(check="cuda", status="refused", message=message))
    state_bytes = known.state_bytes
    if not any(finding.status == "refused" for finding in trapped):
        finding, report.memory = _memory(case, memory and not on_cpu, progress)
        if memory and on_cpu:
            message = "Memory was not checked: hardware=cpu, and only GPUs are compiled for. "
            finding = finding.model_copy(update={"message": message + finding.message})
        report.findings.append(finding)
        state_bytes = report.memory.state_bytes if report.memory else state_bytes
    else:
        message = "Not compiled: put right first what is refused above."
        report.findings.append(Finding(check="memory", status="skipped", message=message))
    report.findings.append(check_disk(case, state_bytes))
    return report


def check_gpus(found: list[Gpu], target: Target) -> Finding:
    """What there is, against what the run is for."""
    names = ", ".join(gpu.name for gpu in found)
    if not found:
        status: Any = "note" if target.config_file else "warn"
        message = f"No NVIDIA GPU here (nvidia-smi finds none); checked for {target.name}."
        return Finding(check="gpu", status=status, message=message)
    if target.devices > len(found):
        message = (
            f"Here are {len(found)} GPUs ({names}), and {target.name} was asked for; set "
            f"ici_data_parallelism={len(found)}."
        )
        return Finding(check="gpu", status="warn", message=message)
    capability = found[0].compute_capability
    if capability is None:
        message = f"{names}: nvidia-smi does not know what they can compute."
        return Finding(check="gpu", status="warn", message=message)
    if capability == (7, 5):
        message = f"{names}: FP16 tensor cores, no bfloat16."
        return Finding(check="gpu", status="ok", message=message)
    if capability < (7, 0):
        message = f"{names}: no tensor cores, so FP16 gains little; choose T4 x2."
        return Finding(check="gpu", status="warn", message=message)
    if capability < (8, 0):
        message = f"{names}: not the T4 that the recipe was made for; FP16 works."
        return Finding(check="gpu", status="warn", message=message)
    message = f"{names}: has bfloat16, which needs no loss scaling; dtype=bfloat16 is possible."
    return Finding(check="gpu", status="warn", message=message)


def _memory(
    case: Case, compile_step: bool, progress: Callable[[str], None]
) -> tuple[Finding, MemoryReport | None]:
    """The compiled step's memory; without compiling, only the state's."""
    patch = compiled.Patch(arguments=case.settings.patches)
    devices = case.target.devices or 1
    try:
        if not compile_step:
            if case.settings.state_bytes is not None:
                message = "The train step was not compiled."
                return Finding(check="memory", status="skipped", message=message), None
            progress("building the abstract train state")
            report = compiled.state_size(case.config, devices, patch)
            message = (
                f"{report.parameters:,} parameters, a train state of "
                f"{report.state_bytes / 2**30:.2f} GiB; the train step was not compiled."
            )
            return Finding(check="memory", status="skipped", message=message), report
        progress(f"compiling the train step for {case.target.name}, about half a minute")
        report = compiled.measure(case.config, case.target, patch=patch, progress=progress)
    except ConfigError as error:
        return Finding(check="memory", status="refused", message=str(error)), None
    except MoeconvError as error:
        status: Any = "warn" if compile_step else "skipped"
        message = f"Memory was not checked: {error}"
        return Finding(check="memory", status=status, message=message), None
    return _verdict(report), report


def _verdict(report: MemoryReport) -> Finding:
    first = report.rows[0]
    sentence = (
        f"The train step needs {first.total / 2**30:.1f} GiB of the "
        f"{first.usable / 2**30:.1f} GiB that JAX takes of each GPU"
    )
    if first.fits:
        if first.xla_rematerialised:
            message = f"{sentence}; XLA recomputes values to get there, which costs time."
            return Finding(check="memory", status="warn", message=message)
        return Finding(check="memory", status="ok", message=f"{sentence}.")
    fitting = [row for row in report.rows if row.fits]
    if fitting:
        row = fitting[0]
        fix = f"{row.name} would need {row.total / 2**30:.1f} GiB and trains the same model"
    else:
        fix = (
            f"none of {len(report.rows) - 1} settings that save memory is enough; shorten "
            "max_target_length"
        )
    return Finding(check="memory", status="refused", message=f"{sentence}; {fix}.")
