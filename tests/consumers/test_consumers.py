"""What `moeconv convert` writes is read alike by transformers 4 and 5, mlx-lm and mistral.rs.

Each consumer runs in an environment of its own, made from requirements/consumers/ and kept in the
user's cache directory; only transformers 5 is that of the tests. The reference is MaxText itself.
"""

import hashlib
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic
from checkpoints.deepseek import DEEPSEEK_V2, DEEPSEEK_V3, DEEPSEEK_V32, KIMI_K2
from checkpoints.envy import ENVY
from checkpoints.gpt_oss import GPT_OSS
from checkpoints.llama import LLAMA2
from checkpoints.llama4 import LLAMA4
from checkpoints.mixtral import MIXTRAL
from checkpoints.olmo3 import OLMO3
from checkpoints.qwen3_moe import QWEN3_MOE
from checkpoints.row import TIED
from consumer import PROMPT, STEPS, reference_of
from helpers import run, tokens_for

from moeconv.artifact.manifest import Manifest
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.families import blocks, targets
from moeconv.verification.models.maxtext import MaxTextModel

# Environments are made here, which is downloading where no cache has the packages.
pytestmark = [
    pytest.mark.proof("consumers", inputs=["requirements/consumers/*.txt"]),
    pytest.mark.timeout(1800),
]

HERE = Path(__file__).parent
REQUIREMENTS = HERE.parents[1] / "requirements" / "consumers"

# The script of each consumer, and the largest difference from MaxText's logits (of std about 1)
# that its arithmetic leaves: 1.5e-5 was measured, and 3e-3 in mistral.rs, which rounds more.
CONSUMERS: dict[str, tuple[str, float]] = {
    "transformers-4.46": ("run_transformers.py", 1e-4),
    "transformers-4.57": ("run_transformers.py", 1e-4),
    "transformers-5": ("run_transformers.py", 1e-4),
    "mlx-lm": ("run_mlx_lm.py", 1e-4),
    "mistral.rs": ("run_mistralrs.py", 1e-2),
}

# head_dim (16) is hidden_size / heads, and a byte-level tokenizer fits.
SIZES = {"base_emb_dim": 64, "vocab_size": 384}
LLAMA31 = {"rope_type": "llama3.1", "max_target_length": 96}
MODELS: dict[str, tuple[tuple[dict, ...], dict[str, Any]]] = {
    "mixtral": ((MIXTRAL,), {}),
    "mixtral-tied": ((MIXTRAL, TIED), {}),
    "envy": ((ENVY, TIED), {}),
    "envy-untied-by-us": ((ENVY, TIED), {"untie": True}),
    "envy-wide-dense": ((ENVY, TIED, {"base_mlp_dim": 128}), {}),
    "envy-bfloat16-in-shards": (
        (ENVY, TIED, {"weight_dtype": "bfloat16"}),
        {"max_shard_bytes": 200_000},
    ),
    "envy-as-ernie": ((ENVY, TIED), {"target": "ernie4_5_moe"}),
    "llama2-llama3.1-rope": ((LLAMA2, TIED, LLAMA31), {}),
    "mixtral-llama3.1-rope": ((MIXTRAL, LLAMA31), {}),
    "mixtral-head-dim-24": ((MIXTRAL, {"head_dim": 24}), {}),
    "qwen3_moe": ((QWEN3_MOE,), {}),
    # The limit that others have by heart.
    "gpt_oss": ((GPT_OSS, {"mlp_activations_limit": 7.0}), {}),
    "deepseek_v2": ((DEEPSEEK_V2,), {}),
    "deepseek_v3": ((DEEPSEEK_V3,), {}),
    "deepseek_v3-without-groups": ((KIMI_K2,), {}),
    "deepseek_v32": ((DEEPSEEK_V32,), {}),
    "llama4": ((LLAMA4,), {}),
    "olmo3": ((OLMO3,), {}),
}

# What a consumer cannot do, held here so that what we say of it stays true.
REFUSED = {
    ("transformers-4.46", "envy-as-ernie"): "does not recognize this architecture",
    ("mistral.rs", "envy-as-ernie"): "Unsupported Hugging Face Transformers -CausalLM model class",
    ("transformers-4.46", "mixtral-head-dim-24"): "size mismatch for model.layers.0.self_attn",
    ("mlx-lm", "mixtral-head-dim-24"): "Expected shape (64, 64) but received shape (96, 64)",
    ("mistral.rs", "mixtral-head-dim-24"): "shape mismatch for model.layers.0.self_attn",
    ("mlx-lm", "gpt_oss"): "parameters not in model: \nmodel.layers.0.mlp.experts.down_proj",
    ("mistral.rs", "gpt_oss"): "cannot find tensor model.layers.0.mlp.experts.gate_proj.weight",
    ("mistral.rs", "deepseek_v2"): "any variant of untagged enum DeepSeekV2RopeScaling",
    ("mistral.rs", "deepseek_v3"): "any variant of untagged enum DeepSeekV2RopeScaling",
    (
        "mistral.rs",
        "deepseek_v3-without-groups",
    ): "any variant of untagged enum DeepSeekV2RopeScaling",
    ("mlx-lm", "llama4"): "parameters not in model",
    ("mistral.rs", "llama4"): "model class `Llama4ForCausalLM`",
}
# Architectures that a consumer is too old for, or does not have; it says so itself.
NEW = "does not recognize this architecture"
UNKNOWN = {
    ("transformers-4.46", "qwen3_moe"): NEW,
    ("transformers-4.46", "gpt_oss"): NEW,
    ("transformers-4.46", "deepseek_v2"): NEW,
    ("transformers-4.46", "deepseek_v3"): NEW,
    ("transformers-4.46", "deepseek_v3-without-groups"): NEW,
    ("transformers-4.46", "deepseek_v32"): NEW,
    ("transformers-4.57", "deepseek_v32"): NEW,
    ("mistral.rs", "deepseek_v32"): "model class `DeepseekV32ForCausalLM`",
    ("transformers-4.46", "llama4"): NEW,
    ("transformers-4.46", "olmo3"): NEW,
    ("mistral.rs", "olmo3"): "model class `Olmo3ForCausalLM`",
}
MISREAD = [
    ("transformers-4.46", "mixtral-llama3.1-rope"),
    ("mlx-lm", "mixtral-llama3.1-rope"),
    ("mistral.rs", "mixtral-llama3.1-rope"),
    ("transformers-4.57", "deepseek_v2"),
    ("transformers-4.57", "deepseek_v3"),
    ("mlx-lm", "deepseek_v3"),
    ("mlx-lm", "deepseek_v32"),
    ("transformers-4.57", "olmo3"),
    ("mlx-lm", "olmo3"),
]
READ_ALIKE = [
    (consumer, model)
    for consumer in CONSUMERS
    for model in MODELS
    if (consumer, model) not in {*REFUSED, *UNKNOWN, *MISREAD}
]


@dataclass(frozen=True)
class Converted:
    """A converted model, beside MaxText's."""

    directory: Path
    manifest: Manifest
    maxtext: MaxTextModel
    # Two rows as long as the model's context.
    tokens: np.ndarray
    prompt: list[int]

    def logits_along(self, ids: list[int]) -> np.ndarray:
        """MaxText's logits at each step of generating `ids` after the prompt."""
        tokens = np.zeros_like(self.tokens)
        start, end = len(self.prompt), len(self.prompt) + len(ids)
        tokens[:, :end] = [*self.prompt, *ids]
        return self.maxtext.logits(tokens, head="unrounded")[0, start - 1 : end - 1]


@pytest.fixture(scope="module")
def converted(maxtext_lab, tmp_path_factory) -> dict[str, Converted]:
    """Every model, converted, with MaxText's logits beside it."""
    from moeconv_train.tokenizer import read_stories

    root = tmp_path_factory.mktemp("consumers")
    corpus = runpy.run_path(str(HERE.parents[1] / "tools" / "make_corpus.py"))
    tokenizer = corpus["train_tokenizer"](read_stories(), SIZES["vocab_size"])
    corpus["save_tokenizer"](tokenizer, root / "tokenizer")
    models = {}
    for name, (parts, options) in MODELS.items():
        checkpoint = maxtext_lab.checkpoint(*parts, SIZES)
        manifest = run(checkpoint, root / name, tokenizer=str(root / "tokenizer"), **options)
        maxtext = MaxTextModel.load(checkpoint.items, checkpoint.config)
        tokens = tokens_for(checkpoint)
        logits = maxtext.logits(tokens, head="unrounded")
        assert 0.3 < logits.std() < 30, "the test model must have logits that mistakes would move"
        np.savez(reference_of(root / name), tokens=tokens, logits=logits)
        prompt = tokenizer.encode(PROMPT).ids
        models[name] = Converted(root / name, manifest, maxtext, tokens, prompt)
    return models


@pytest.fixture(scope="module")
def found(converted) -> Callable[[str], dict[str, dict[str, Any]]]:
    """What a consumer finds in each model; it is run once, when first asked."""
    findings: dict[str, dict[str, dict[str, Any]]] = {}

    def ask(consumer: str) -> dict[str, dict[str, Any]]:
        if consumer not in findings:
            script, _ = CONSUMERS[consumer]
            folders = [model.directory for model in converted.values()]
            findings[consumer] = read_by(consumer, script, folders)
        return findings[consumer]

    return ask


def read_by(consumer: str, script: str, folders: list[Path]) -> dict[str, dict[str, Any]]:
    """What a script finds in model directories, by their names; it runs in a consumer's Python."""
    # Which is to find nothing of ours.
    env = {**os.environ, "PYTHONPATH": "", "CUDA_VISIBLE_DEVICES": "", "RUST_LOG": "off"}
    printed = output([python_of(consumer), HERE / script, *folders], env)
    found: dict[str, dict[str, Any]] = json.loads(printed.splitlines()[-1])
    return found


def python_of(consumer: str) -> Path:
    """The Python of the consumer's environment, which is made when first needed."""
    if consumer == "transformers-5":
        return Path(sys.executable)
    pins = REQUIREMENTS / f"{consumer}.txt"
    key = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    environment = cache / "moeconv-tests" / f"{consumer}-{key}"
    python, complete = environment / "bin" / "python", environment / "complete"
    if not complete.exists():
        output([uv(), "venv", "--quiet", "--clear", "--python", sys.executable, environment])
        output([uv(), "pip", "sync", "--quiet", "--require-hashes", "--python", python, pins])
        complete.touch()
    return python


def uv() -> str | Path:
    """The uv that `make venv` installs, or one on PATH, where a shim may not run."""
    for candidate in (os.environ.get("UV"), Path(sys.prefix, "bin", "uv"), "uv"):
        with suppress(OSError, subprocess.CalledProcessError):
            if candidate:
                output([candidate, "--version"])
                return candidate
    pytest.fail("there is no uv; `make venv` installs it, and UV=/path/to/uv names another")


def output(words: list[str | Path], env: dict[str, str] | None = None) -> str:
    """Stdout of a command; if it fails, pytest shows its stderr."""
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    print(done.stderr)
    done.check_returncode()
    return done.stdout


def difference(model: Converted, finding: dict[str, Any]) -> float:
    """How far a consumer's numbers lie from MaxText's."""
    ids = finding["greedy"]
    logits = model.logits_along(ids)
    if "logprobs" in finding:
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        # The median of the steps: rounding alone can send a token to another expert.
        return float(np.median(np.abs(logprobs - finding["logprobs"]).max(axis=-1)))
    # Of two tokens that are as likely either may come first, so it counts by how much one does not.
    greedy = (logits.max(axis=-1) - logits[np.arange(len(ids)), ids]).max() / 2
    return max(finding["max_abs"], float(greedy))


@pytest.mark.parametrize(("consumer", "name"), READ_ALIKE)
def test_read_alike(converted, found, consumer, name):
    finding = found(consumer)[name]
    assert "error" not in finding
    assert finding["prompt"] == converted[name].prompt
    assert 1 <= len(finding["greedy"]) <= STEPS
    assert difference(converted[name], finding) <= CONSUMERS[consumer][1]


@pytest.mark.parametrize(("consumer", "name"), REFUSED)
def test_refused(converted, found, consumer, name):
    assert REFUSED[consumer, name] in found(consumer)[name].get("error", "it was read")
    assert warned(converted[name], consumer)


@pytest.mark.parametrize(("consumer", "name"), UNKNOWN)
def test_unknown(converted, found, consumer, name):
    assert UNKNOWN[consumer, name] in found(consumer)[name].get("error", "it was read")


@pytest.mark.parametrize(("consumer", "name"), MISREAD)
def test_misread(converted, found, consumer, name):
    """Read without a word, and as another model: a scale, a window or groups are not its own."""
    assert difference(converted[name], found(consumer)[name]) > 2 * CONSUMERS[consumer][1]
    assert warned(converted[name], consumer)


def test_every_config_is_read_alike_by_transformers_4_and_5(converted, tmp_path):
    """Each value under its key, RoPE too, and the same defaults where config.json has no key."""
    folders = {model.manifest.target: model.directory for model in converted.values()}
    for block in synthetic.BLOCKS:
        for target in set(blocks()[block].targets[:1]) - set(folders):
            made = synthetic.write(tmp_path / f"{target}-run", block)
            options = ConvertOptions(config=made.config_file(), target=target)
            folders[target] = tmp_path / target
            convert(plan_conversion(str(made.step_dir), options), folders[target])
    assert set(folders) == set(targets())
    asked = list(folders.values())
    four, five = (
        read_by(f"transformers-{release}", "read_configs.py", asked) for release in ("4.57", "5")
    )
    for target, folder in folders.items():
        config = json.loads((folder / "config.json").read_text())
        del config["transformers_version"]
        old, new = four[folder.name], five[folder.name]
        assert "error" not in new, target
        if targets()[target].since.startswith("5.") and "error" in old:
            assert NEW in old["error"], target
            continue
        assert old["read"] == config, target
        # 5 keeps theta and the like with the rest, and shows all of it as `rope_scaling` too.
        moved = {
            "rope_theta",
            "rope_local_base_freq",
            "rope_scaling",
            *(config.get("rope_parameters") or {}),  # GPT-2 has none
        }
        rest = {key: value for key, value in config.items() if key not in moved}
        assert {key: new["read"].get(key) for key in rest} == rest, target
        shared = old["defaults"].keys() & new["defaults"].keys()
        assert {k: old["defaults"][k] for k in shared} == {k: new["defaults"][k] for k in shared}


def warned(model: Converted, consumer: str) -> bool:
    """Whether converting said something of this consumer."""
    return any(consumer.partition("-4")[0] in text for text in model.manifest.warnings)
