"""From a command line to a run that may start: recipe, preflight, data."""

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeconv_train import feed as feeds
from moeconv_train import plan as plans
from moeconv_train import recipe as recipes
from moeconv_train import streaming
from moeconv_train.data import Progress
from moeconv_train.logs import wandb
from moeconv_train.plan import Plan
from moeconv_train.preflight import Finding, PreflightReport, preflight
from moeconv_train.preflight.target import gpus

from moeconv.errors import ConfigError


@dataclass(frozen=True)
class Start:
    """A plan with what the checks found; what they mend is in the plan."""

    plan: Plan
    report: PreflightReport


def plan_run(
    words: Iterable[str],
    *,
    memory: bool = False,
    network: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Start:
    """Reads and checks a run; writes nothing.

    Args:
        words: `[RECIPE|FILE.yml] [key=value …]`.
        memory: Whether to compile the train step for the target.
        network: Whether to ask the Hub and W&B.
        progress: Told what takes time.

    Raises:
        MoeconvError: Something of it is wrong.
    """
    return _checked(plans.make(recipes.read(words), gpus()), memory, network, progress)


def _checked(plan: Plan, memory: bool, network: bool, progress: Callable[[str], None]) -> Start:
    online = network and os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes")
    report = preflight(
        plan.config,
        plan.known(),
        target=plan.target,
        memory=memory,
        online=online,
        progress=progress,
    )
    if plan.config["enable_wandb"] and (trouble := wandb.missing()):
        mend = {"enable_wandb": False}
        report.findings.append(
            Finding(check="wandb", status="mended", message=trouble, mended=mend)
        )
    return Start(replace(plan, mended={**plan.mended, **report.mended}), report)


def refuse(start: Start) -> None:
    """Says why a run may not start.

    Raises:
        ConfigError: One sentence for each reason.
    """
    if start.report.refused:
        raise ConfigError("\n".join(finding.message for finding in start.report.refused))


def with_data(
    start: Start,
    *,
    note: Callable[[str], None],
    progress: Callable[[Progress], None],
    quiet: bool,
) -> Start:
    """The same run with its data, prepared now where they are not there, and its steps counted.

    Raises:
        MoeconvError: The data cannot be had, do not fit, or are less than the steps given.
    """
    plan = start.plan
    if plan.target.config_file is not None:
        raise ConfigError(
            f"hardware={plan.config['hardware']}: there is no NVIDIA GPU here (nvidia-smi finds "
            "none); train on a machine with one, try the tiny_cpu recipe, or use --check"
        )
    feed = feeds.prepare(
        plan.feed,
        int(plan.config["max_target_length"]),
        note=note,
        progress=progress,
        quiet=quiet,
    )
    if plan.feed.dataset is None and feed.dataset is not None:
        counted = plans.make(plan.recipe, gpus(), feed)
        start = _checked(counted, False, False, lambda _: None)
        refuse(start)
    if start.plan.feed.kind == "hf" and not start.plan.config["tokenizer_path"]:
        output = start.plan.derived["base_output_directory"]
        path = streaming.tokenizer_for(start.plan.run.data, Path(output))
        derived = {**start.plan.derived, "tokenizer_path": path}
        start = replace(start, plan=replace(start.plan, derived=derived))
    return start


def facts(plan: Plan) -> Mapping[str, Any]:
    """A plan as data: what `--dry-run` prints."""
    size = plan.size
    return {
        "recipe": plan.recipe.name,
        "run_dir": str(plan.run_dir),
        "target": plan.target.name,
        "devices": plan.devices,
        "parameters": size.total if size else None,
        "active_parameters": size.active if size else None,
        "data": {
            "kind": plan.feed.kind,
            "source": plan.feed.named or plan.feed.settings.source,
            "directory": str(plan.feed.directory) if plan.feed.directory else None,
            "prepared": plan.feed.dataset is not None,
        },
        "steps": plan.steps,
        "epochs": plan.epochs,
        "batch_rows": plan.batch,
        "tokens_per_step": plan.tokens_per_step,
        "run": plan.run.model_dump(mode="json"),
        "maxtext": dict(plan.settings),
        "notes": list(plan.notes),
    }
