"""Reads model directories with mlx-lm, on CPU."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from consumer import PROMPT, STEPS, main, reference_of
from mlx_lm import load
from mlx_lm.generate import generate_step

mx.set_default_device(mx.cpu)


def read(directory: Path) -> dict[str, Any]:
    model, tokenizer = load(str(directory))
    model.set_dtype(mx.float32)
    reference = np.load(reference_of(directory))
    logits = np.array(model(mx.array(reference["tokens"])))
    prompt = tokenizer.encode(PROMPT)
    steps = generate_step(mx.array(prompt), model, max_tokens=STEPS)
    return {
        "max_abs": float(np.abs(logits - reference["logits"]).max()),
        "prompt": prompt,
        "greedy": [int(token) for token, _ in steps],
    }


main(read)
