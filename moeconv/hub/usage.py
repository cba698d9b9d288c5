"""Code for a card that loads the model: what a reader copies, and what the tests run."""

import json

from moeconv.hub.local import Output


def usage(output: Output, repo_id: str, revision: str) -> list[str]:
    """Sections for transformers and vLLM."""
    at = "" if revision == "main" else f", revision={json.dumps(revision)}"
    context = output.model.max_position_embeddings
    new = max(1, min(64, context // 2))
    if output.has_tokenizer:
        return _with_tokenizer(repo_id, at, new, context)
    first = output.model.bos_token_id if output.model.bos_token_id is not None else 1
    return _with_ids(repo_id, at, new, context, first)


def _with_tokenizer(repo_id: str, at: str, new: int, context: int) -> list[str]:
    return [
        "With [transformers](https://github.com/huggingface/transformers):",
        _code(f'''
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}"{at})
model = AutoModelForCausalLM.from_pretrained("{repo_id}"{at}, dtype="auto")

inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens={new})
print(tokenizer.decode(output[0], skip_special_tokens=True))
'''),
        "With [vLLM](https://github.com/vllm-project/vllm):",
        _code(f'''
from vllm import LLM, SamplingParams

llm = LLM("{repo_id}"{at}, max_model_len={context})
outputs = llm.generate(["Once upon a time"], SamplingParams(temperature=0, max_tokens={new}))
print(outputs[0].outputs[0].text)
'''),
    ]


def _with_ids(repo_id: str, at: str, new: int, context: int, first: int) -> list[str]:
    return [
        "There is no tokenizer in this repository: the model takes and gives token ids.",
        "With [transformers](https://github.com/huggingface/transformers):",
        _code(f'''
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{repo_id}"{at}, dtype="auto")

output = model.generate(torch.tensor([[{first}]]), max_new_tokens={new})
print(output[0].tolist())
'''),
        "With [vLLM](https://github.com/vllm-project/vllm):",
        _code(f'''
from vllm import LLM, SamplingParams

llm = LLM("{repo_id}"{at}, max_model_len={context}, skip_tokenizer_init=True)
sampling = SamplingParams(temperature=0, max_tokens={new}, detokenize=False)
outputs = llm.generate([{{"prompt_token_ids": [{first}]}}], sampling)
print(outputs[0].outputs[0].token_ids)
'''),
    ]


def _code(text: str) -> str:
    return f"```python\n{text.strip()}\n```"
