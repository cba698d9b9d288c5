"""From a command line to a run that may start: recipe, preflight, data."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moeconv_train import feed as feeds
from moeconv_train import plan as plans
from moeconv_train import recipe as recipes
from moeconv_train.plan import Plan
from moeconv_train.preflight.check import preflight
from moeconv_train.preflight.report import Preflight
from moeconv_train.preflight.target import gpus

from moeconv.errors import ConfigError
from moeconv.printing import Printable


def plan_run(
    words: Iterable[str],
    *,
    memory: bool = False,
    network: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Preflight:
    """Reads and checks a run; writes nothing.

    Args:
        words: `[RECIPE|FILE.yml] [key=value …]`.
        memory: Whether to compile its steps for the target.
        network: Whether to ask the Hub and W&B.
        progress: Told what takes time.

    Raises:
        MoeconvError: Something of it is wrong.
    """
    online = network and os.environ.get("HF_HUB_OFFLINE", "").lower() not in ("1", "true", "yes")
    plan = plans.make(recipes.read(words), gpus())
    return preflight(plan, memory=memory, online=online, progress=progress)


def with_data(
    begun: Preflight,
    *,
    note: Callable[[str], None],
    progress: Callable[[str], None],
    quiet: bool,
) -> Preflight:
    """The same run with its data, prepared now where they are not there, and its steps counted.

    Raises:
        MoeconvError: The data cannot be had, do not fit, or are less than the steps given.
    """
    plan = begun.plan
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
        begun = preflight(counted, memory=False, online=False)
        begun.refuse()
        plan = begun.plan
    if plan.feed.kind == "hf" and not plan.config["tokenizer_path"]:
        path = feeds.tokenizer_for(plan.run.data, Path(plan.derived["base_output_directory"]))
        begun = replace(begun, plan=replace(plan, derived={**plan.derived, "tokenizer_path": path}))
    return begun


def describe(plan: Plan) -> str:
    """A run in one sentence."""
    parts = [f"{plan.recipe.name} -> {plan.run_dir}"]
    if size := plan.size:
        active = f", {size.active:,} active" if size.active != size.total else ""
        parts.append(f"{size.total:,} parameters{active}")
    steps = f"{plan.steps:,} steps of {plan.batch} x {plan.config['max_target_length']:,} tokens"
    if plan.epochs is not None:
        steps += f", {plan.epochs:.4g} epochs"
    elif plan.feed.kind == "prepared" and plan.run.epochs and "steps" not in plan.recipe.given:
        steps += f", until they are counted for run.epochs={plan.run.epochs}"
    parts.append(steps)
    parts.append(f"{plan.config['dtype']} on {plan.target.devices} devices of {plan.target.name}")
    patches = {name: on for name, on in plan.patches.items() if name != "loss_scale"}
    if chosen := [f"{name}={str(on).lower()}" for name, on in patches.items()]:
        parts.append(f"with {', '.join(chosen)}")
    return "; ".join(parts)


def facts(plan: Plan) -> Mapping[str, Any]:
    """A plan as data: what `--dry-run` prints."""
    size, feed = plan.size, plan.feed
    return {
        "recipe": plan.recipe.name,
        "run_dir": str(plan.run_dir),
        "target": plan.target.name,
        "devices": plan.target.devices,
        "parameters": size.total if size else None,
        "active_parameters": size.active if size else None,
        "data": {
            "kind": feed.kind,
            "source": feed.named or feed.settings.source,
            "directory": str(feed.directory) if feed.directory else None,
            "prepared": feed.dataset is not None,
        },
        "steps": plan.steps,
        "epochs": plan.epochs,
        "batch_rows": plan.batch,
        "tokens_per_step": plan.tokens_per_step,
        "run": plan.run.model_dump(mode="json"),
        "maxtext": dict(plan.settings),
        "notes": list(plan.notes),
    }


@dataclass(frozen=True)
class Preview(Printable):
    """A run that is looked at and not trained.

    Attributes:
        begun: The run, and what the checks found.
        settings: True if MaxText's settings are shown too.
    """

    begun: Preflight
    settings: bool

    def as_dict(self) -> dict[str, Any]:
        """What `moeconv train --check --json` prints."""
        return {"plan": facts(self.begun.plan), "preflight": self.begun.to_json()}

    def parts(self) -> Iterator[str]:
        """What `moeconv train --check` prints."""
        plan = self.begun.plan
        yield describe(plan)
        yield from (f"note: {text}" for text in plan.notes)
        if self.settings:
            yield from (f"  {setting}" for setting in plan.argv()[2:])
        yield from self.begun.lines()
