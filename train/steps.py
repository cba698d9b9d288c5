"""How many steps a run has and after which it is evaluated, by the rows of its data."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moeconv_train.data.manifest import VALIDATION
from moeconv_train.preflight.config import value_of
from moeconv_train.settings import EMBEDDED

from moeconv.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from moeconv_train.plan import Plan


def counted(plan: "Plan") -> "Plan":
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
    one = dataset.steps_for_epochs(1, batch)
    if run.epochs is not None:
        epochs = run.epochs
        available = dataset.steps_for_epochs(epochs, batch)
        steps = int(value_of(given["steps"])) if "steps" in given else available
    else:
        steps = int(config["steps"])
        # Not steps / one: MaxText fills an epoch's last batch with rows of the next.
        epochs = max(1, steps // one)
        while dataset.steps_for_epochs(epochs, batch) < steps:
            epochs += 1
        available = dataset.steps_for_epochs(epochs, batch)
    found |= {"num_epoch": epochs, "steps": steps}
    found |= evaluations(plan, dataset.eval_batches(batch) > 0, steps, available / epochs)
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


def evaluations(plan: "Plan", possible: bool, steps: int, epoch: float) -> dict[str, Any]:
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
