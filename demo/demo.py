"""`make demo`: trains a tiny MoE with MaxText, converts it, and proves that it is the same model.

Everything lies in ./demo-out, which is made anew each time. Needs no network and no GPU.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo-out")  # relative to ROOT, so that the commands shown can be copied
RUN = OUT / "tiny"
MODEL = OUT / "tiny-hf"
BIN = Path(sys.executable).parent

PROMPTS = ("Once upon a time", "One day Mia", "It was late, and Tom")


def say(text: str = "") -> None:
    """Prints at once, also into a pipe."""
    print(text, flush=True)


def heading(number: int, text: str) -> None:
    """Announces a step."""
    say(f"\n[{number}/6] {text}")


def command(*words: str | Path) -> None:
    """Shows a command, runs it, and ends the demo if it fails."""
    say("  $ " + " ".join(map(str, words)))
    code = subprocess.run([BIN / words[0], *words[1:]], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(f"demo: `{words[0]} {words[1]}` failed with exit code {code}")


def train() -> None:
    """MaxText's own loop, behind one command."""
    command("moeconv", "train", "tiny_cpu", f"base_output_directory={OUT}")


def generate() -> None:
    """The converted model by stock transformers: what a user of the Hub would run."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=96,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )[0]
        story = tokenizer.decode(output, skip_special_tokens=True)
        say(f"  {prompt} →{story.removeprefix(prompt)}")


def main() -> None:
    """The steps."""
    os.chdir(ROOT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    begin = time.monotonic()
    steps = (
        ("Train a tiny MoE with unmodified MaxText, on two data-parallel CPU devices", train),
        ("What moeconv sees in the run", lambda: command("moeconv", "inspect", RUN)),
        ("Convert it", lambda: command("moeconv", "convert", RUN, MODEL)),
        ("Let the converted model tell stories", generate),
        (
            "Is it the same model? Structure, every weight, logits and every layer",
            lambda: command("moeconv", "verify", MODEL),
        ),
    )
    for number, (text, step) in enumerate(steps, start=1):
        start = time.monotonic()
        heading(number, text)
        step()
        say(f"  ({time.monotonic() - start:.0f} s)")
    heading(len(steps) + 1, f"Done in {time.monotonic() - begin:.0f} s")
    say(f"  MaxText run:         {RUN}")
    say(f"  Hugging Face model:  {MODEL}")
    say(f"  Its verification:    {MODEL / 'verify.md'}")
    say("  Next: the same on a checkpoint of your own")
    say("    .venv/bin/moeconv inspect RUN")
    say("    .venv/bin/moeconv convert RUN OUT")
    say("    .venv/bin/moeconv verify OUT")


if __name__ == "__main__":
    main()
