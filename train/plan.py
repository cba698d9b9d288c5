"""What is decided about a run before MaxText is imported: its settings, data and steps."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moeconv_train import feed as feeds
from moeconv_train.data.manifest import TRAIN, VALIDATION
from moeconv_train.feed import Feed
from moeconv_train.model_size import ModelSize, model_size
from moeconv_train.preflight.config import mesh_devices, resolve, said, value_of
from moeconv_train.preflight.target import T4X2, Target
from moeconv_train.recipe import Recipe
from moeconv_train.settings import EMBEDDED, RunFile
from moeconv_train.trial_file import chosen

from moeconv.errors import ConfigError, UsageError
from moeconv.untrusted.files import is_address

OUTPUT = "runs"


@dataclass(frozen=True)
class Plan:
    """One run.

    Attributes:
        recipe: Its config file and what the command line says over it.
        target: The devices it is for.
        feed: Its rows.
        derived: The MaxText settings that follow from data, devices and `run.…`.
        mended: Those that the preflight puts right.
        steps_per_epoch: Exactly; None where that is not known.
        notes: What the user should know, one sentence each.
    """

    recipe: Recipe
    target: Target
    feed: Feed
    derived: Mapping[str, Any]
    mended: Mapping[str, Any] = field(default_factory=dict)
    steps_per_epoch: float | None = None
    available: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> RunFile:
        """What is not MaxText's."""
        return self.recipe.run

    @property
    def settings(self) -> dict[str, Any]:
        """What MaxText is given over the config file."""
        return {**self.recipe.given, **self.derived, **self.mended}

    @cached_property
    def config(self) -> dict[str, Any]:
        """Every MaxText setting, by its name."""
        return resolve({**self.recipe.keys, **self.settings})

    @property
    def told(self) -> dict[str, Any]:
        """The settings that MaxText keeps as they are given, and where its schedule ends.

        Those that ask for its default (-1, nothing), and lists and mappings, it rewrites.
        """
        config = self.config
        schedule = int(config["learning_rate_schedule_steps"] or -1)
        kept = {
            key: config[key]
            for key in {**self.recipe.keys, **self.settings}
            if isinstance(config.get(key), (bool, int, float, str)) and config[key] not in ("", -1)
        }
        return {
            **kept,
            "learning_rate_schedule_steps": schedule if schedule > 0 else self.steps,
        }

    @property
    def run_dir(self) -> Path:
        """Where the run lies."""
        return Path(self.derived["base_output_directory"], str(self.config["run_name"]))

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.config["steps"])

    @property
    def epochs(self) -> float | None:
        """How often every row is read."""
        return self.steps / self.steps_per_epoch if self.steps_per_epoch else None

    @property
    def batch(self) -> int:
        """Rows of a step."""
        # As MaxText counts them (types.py `calculate_global_batch_sizes`).
        rows = float(self.config["per_device_batch_size"]) * self.target.devices
        return int(rows) * int(self.config["gradient_accumulation_steps"])

    @property
    def tokens_per_step(self) -> int:
        """Positions of a step."""
        return self.batch * int(self.config["max_target_length"])

    @property
    def source_digest(self) -> str | None:
        """Of the data that MaxText reads by itself; prepared ones have a digest of their own."""
        return None if self.feed.dataset else feeds.source_digest(self.config)

    @property
    def size(self) -> ModelSize | None:
        """The model's."""
        return model_size(self.config)

    @property
    def patches(self) -> dict[str, Any]:
        """Arguments of preflight/patches.py: how MaxText's step is computed.

        What the run's trial chose counts more than the recipe, the command line more than both.
        """
        scale, given = self.run.loss_scale.model_dump(exclude_none=True), self.run.patches
        told = {name: on for name, on in given.items() if f"patches.{name}" in self.recipe.told}
        return {"loss_scale": scale, **given, **(chosen(self.run_dir) or {}), **told}

    def argv(self) -> list[str]:
        """MaxText's command line; what the user gave stays as it was given."""
        ours = {key: said(value) for key, value in {**self.derived, **self.mended}.items()}
        words = [f"{key}={text}" for key, text in {**self.recipe.given, **ours}.items()]
        return ["", str(self.recipe.file), *words]

    @property
    def scales_loss(self) -> bool:
        """Whether the loss is scaled."""
        # As `LossScaleSettings.scales`, which wants a dtype that numpy knows.
        default = "dynamic" if self.config["dtype"] == "float16" else "off"
        return (self.run.loss_scale.mode or default) != "off"


def make(recipe: Recipe, found: Target | None, feed: Feed | None = None) -> Plan:
    """The plan of a recipe on a machine with these GPUs; `feed` if rows were prepared since.

    Raises:
        ConfigError: Model and data do not fit each other.
        UsageError: There is nothing to train on.
    """
    given = recipe.given
    own = {**recipe.keys, **given}
    derived: dict[str, Any] = {}
    notes: list[str] = []
    if "hardware" not in own:
        derived["hardware"] = "gpu" if found else "cpu"
        notes.append(f"hardware: not said, so {derived['hardware']}, which this machine has")
    config = resolve({**own, **derived})
    if config["steps"] < 1:
        raise UsageError(f"steps={config['steps']}: must be 1 or more")
    if is_address(config["base_output_directory"]):
        raise ConfigError(
            f"base_output_directory={config['base_output_directory']}: moeconv train writes to a "
            "local folder; copy it elsewhere afterwards"
        )
    output = Path(str(config["base_output_directory"] or OUTPUT)).expanduser()
    if given.get("run_name") == "":
        raise UsageError("run_name: is empty; is a shell variable not set?")
    name = str(config["run_name"] or recipe.file.stem)
    if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
        raise ConfigError(
            f"run_name={name}: leaves {output}; name a folder below it, and choose another place "
            "with base_output_directory"
        )
    defaults = {
        "enable_wandb": recipe.run.wandb.enabled,
        "wandb_project_name": recipe.run.wandb.project,
        "wandb_run_name": recipe.run.wandb.name or name,
    }
    derived |= {key: value for key, value in defaults.items() if key not in own}
    if not config["run_name"]:
        derived["run_name"] = name
    derived["skip_jax_distributed_system"] = True  # one host
    derived["base_output_directory"] = str(output.absolute())
    target = found or T4X2
    if config["hardware"] == "cpu":
        target = Target("this CPU", mesh_devices(config))
    feed = feed or feeds.find(config, recipe, output.absolute())
    plan = Plan(recipe, target, feed, derived, notes=tuple(notes))
    if plan.scales_loss:
        # Such a step is the loss scale's to leave out; MaxText would end the run at it
        # (metric_logger.py `_maybe_abort_after_write_metrics`).
        aborts = dict.fromkeys(("abort_on_nan_loss", "abort_on_inf_loss"), False)
        derived |= {key: value for key, value in aborts.items() if key not in own}
        plan = replace(plan, derived=derived)
    if feed.kind == "hf":
        return replace(plan, derived={**plan.derived, **_streamed(plan)})
    return _counted(plan) if feed.kind == "prepared" else plan


def _streamed(plan: Plan) -> dict[str, Any]:
    """What MaxText needs to tokenise while it trains."""
    data = plan.feed.settings
    found = feeds.hf_settings(plan.config, data)
    if not found:
        return {}
    if plan.recipe.keys.get("dataset_type") == "hf" and data.source is None:
        # A file that is made for streaming: what it says stays.
        found = {key: value for key, value in found.items() if key not in plan.recipe.keys}
    if plan.run.epochs is not None:
        found |= {"num_epoch": plan.run.epochs}
    return {key: value for key, value in found.items() if key not in plan.recipe.given}


def _counted(plan: Plan) -> Plan:
    """Steps and evaluations of prepared rows; the recipe's own are only about right."""
    run, given, dataset = plan.run, plan.recipe.given, plan.feed.dataset
    if "num_epoch" in given:
        raise UsageError(
            f"num_epoch={given['num_epoch']}: steps and evaluations are counted by run.epochs; set "
            f"run.epochs={given['num_epoch']} instead"
        )
    if dataset is None:
        evaluated = run.data.validation_fraction > 0 or run.data.source == EMBEDDED
        found = evaluations(plan, evaluated, plan.steps, plan.steps / (run.epochs or 1))
        found = {key: value for key, value in found.items() if key not in given}
        return replace(plan, derived={**plan.derived, **found})
    config = plan.config
    dataset.check(
        max_target_length=int(config["max_target_length"]), vocab_size=int(config["vocab_size"])
    )
    found = {key: value_of(text) for key, text in dataset.overrides().items()}
    for key in ("max_target_length", "enable_data_shuffling", "data_shuffle_seed"):
        del found[key]  # the model's, and the run's own
    batch = plan.batch
    if batch < 1 or float(config["per_device_batch_size"]) % 1:
        raise ConfigError(
            f"per_device_batch_size={config['per_device_batch_size']}: must be a whole number, so "
            "that steps can be counted; make gradient_accumulation_steps smaller instead"
        )
    # As many as the steps need: MaxText fills an epoch's last batch with rows of the next.
    epochs = run.epochs or (plan.steps - 1) * batch // dataset.counts(TRAIN).rows + 1
    available = dataset.steps_for_epochs(epochs, batch)
    steps = available if run.epochs and "steps" not in given else plan.steps
    found |= {"num_epoch": epochs, "steps": steps}
    found |= evaluations(plan, dataset.counts(VALIDATION).rows > 0, steps, available / epochs)
    kept = {key: value for key, value in found.items() if key not in given}
    notes = plan.notes
    if not dataset.counts(VALIDATION).rows:
        notes += (f"{dataset.directory}: has no validation split: the run is never evaluated",)
    return replace(
        plan,
        derived={**plan.derived, **kept},
        steps_per_epoch=available / epochs,
        available=available,
        notes=notes,
    )


def evaluations(plan: Plan, possible: bool, steps: int, epoch: float) -> dict[str, Any]:
    """`eval_interval` and `eval_start_step`, so that the last evaluation is of the last step.

    MaxText evaluates after step s (from 0) where s >= start and (s - start) % interval == 0.
    """
    if "eval_interval" in plan.recipe.given:
        return {}
    wanted = round(plan.run.evaluations_per_epoch * steps / epoch)
    if not possible or plan.run.evaluations_per_epoch == 0 or steps < 1:
        return {"eval_interval": -1, "eval_start_step": 0}
    count = min(steps, max(1, wanted))
    interval = steps // count
    return {
        "eval_interval": interval,
        "eval_start_step": steps - 1 - (count - 1) * interval,
        "eval_steps": -1,
    }
