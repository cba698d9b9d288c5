"""Reads model directories with the transformers of this Python, 4.46 or newer."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from consumer import PROMPT, STEPS, main, reference_of
from transformers import AutoModelForCausalLM, AutoTokenizer


def read(directory: Path) -> dict[str, Any]:
    model, report = AutoModelForCausalLM.from_pretrained(
        directory,
        torch_dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if any(report.values()):
        raise ValueError(f"not loaded whole: {report}")
    reference = np.load(reference_of(directory))
    prompt = AutoTokenizer.from_pretrained(directory)(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        logits = model(torch.from_numpy(reference["tokens"]).long()).logits.numpy()
        greedy = model.generate(**prompt, max_new_tokens=STEPS)
    ids = prompt["input_ids"][0].tolist()
    return {
        "max_abs": float(np.abs(logits - reference["logits"]).max()),
        "prompt": ids,
        "greedy": greedy[0, len(ids) :].tolist(),
    }


main(read)
