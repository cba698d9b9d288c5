"""What is written next to an adapter's tensors: PEFT's configuration, and the card."""

from typing import Any

from moeconv.hf.config import to_json
from moeconv.mapping.lora import Targeted
from moeconv.maxtext.lora import Strength
from moeconv.planning.adapter import CONFIG_NAME, WEIGHTS_NAME, PlannedAdapter
from moeconv.planning.plan import Plan

CARD_NAME = "README.md"


def adapter_files(plan: Plan, adapter: PlannedAdapter, targeted: Targeted) -> dict[str, bytes]:
    """Every file but the tensors and the manifest, by name."""
    return {
        CONFIG_NAME: to_json(adapter_config(adapter.strength, adapter.base_model, targeted)),
        CARD_NAME: _card(plan, adapter, targeted).encode(),
    }


def adapter_config(
    strength: Strength, base_model: str | None, targeted: Targeted
) -> dict[str, Any]:
    """The keys of `LoraConfig` (peft `tuners/lora/config.py`) that decide what is computed.

    PEFT scales by `lora_alpha / r` (`tuners/lora/layer.py` `update_layer`), as MaxText does.
    """
    alpha = strength.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": strength.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "target_modules": list(targeted.modules) or None,
        **({"target_parameters": list(targeted.parameters)} if targeted.parameters else {}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
    }


def _card(plan: Plan, adapter: PlannedAdapter, targeted: Targeted) -> str:
    strength = adapter.strength
    base = f'"{_quoted(adapter.base_model)}"' if adapter.base_model else "BASE"
    lines = [
        "---",
        *([f"base_model: {base}"] if adapter.base_model else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- maxtext",
        "---",
        "",
        "# LoRA adapter",
        "",
        f"Rank {strength.rank}, alpha {strength.alpha:g}, trained with MaxText and converted by "
        f"moeconv. It changes {_listed(targeted)} of {plan.page.architecture}: to each weight it "
        f"adds alpha / rank = {strength.scale:g} times the product of its two matrices.",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"model = AutoModelForCausalLM.from_pretrained({base})",
        'model = PeftModel.from_pretrained(model, "ADAPTER")',
        "```",
        "",
        f"The base is the model that MaxText trained it on. `{WEIGHTS_NAME}` fits a conversion of "
        f"that checkpoint to {plan.page.architecture} alone.",
    ]
    if targeted.parameters:
        lines += ["", "It needs PEFT 0.17 or later, which knows `target_parameters`."]
    if strength.quantised:
        lines += [
            "",
            f"While it was trained the base was quantised to {strength.quantised}; on a base that "
            "is not, the logits are others than those of training.",
        ]
    return "\n".join([*lines, ""])


def _listed(targeted: Targeted) -> str:
    names = (*targeted.modules, *targeted.parameters)
    shown = [f"`{name}`" for name in names[:8]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} others" if more else "")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
