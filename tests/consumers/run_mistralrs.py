"""Reads model directories with mistral.rs, on CPU.

It gives no logits of a prompt, but of the tokens that it generates it gives every log-probability.
"""

import json
from pathlib import Path
from typing import Any

from consumer import PROMPT, STEPS, main
from mistralrs import ChatCompletionRequest, ModelDType, Runner, Which

# Log-probabilities come with chat only, and chat only with a template.
TEMPLATE = Path(__file__).with_name("content_only.jinja")


def read(directory: Path) -> dict[str, Any]:
    runner = Runner(
        Which.Plain(str(directory), dtype=ModelDType.F32),
        token_source="none",
        jinja_explicit=str(TEMPLATE),
    )
    request = ChatCompletionRequest(
        model="default",
        messages=[{"role": "user", "content": PROMPT}],
        temperature=0.0,
        max_tokens=STEPS,
        ignore_eos=True,
        logprobs=True,
        top_logprobs=json.loads((directory / "config.json").read_text())["vocab_size"],
    )
    # At each step all tokens, the likeliest first.
    steps = [
        step.top_logprobs
        for step in runner.send_chat_completion_request(request).choices[0].logprobs.content
    ]
    return {
        "logprobs": [[t.logprob for t in sorted(step, key=lambda t: t.token)] for step in steps],
        "prompt": runner.tokenize_text(PROMPT, True, None),
        "greedy": [step[0].token for step in steps],
    }


main(read)
