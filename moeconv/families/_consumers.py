"""What serving software makes of an architecture whatever its config.json says, as sentences.

Read in the main branches of llama.cpp, vLLM and SGLang in 2026, and not run: they do not install
here. What each function says has its file there beside it.
"""

from moeconv.arch.description import ModelDescription
from moeconv.families._shared import tied
from moeconv.mapping.rules import Options

_SILENT = "computes something else without a word"


def scores_of_gemma(model: ModelDescription, scalar: int, layers: int) -> list[str]:
    """Of Gemma 2 and 3; llama.cpp src/models/gemma2.cpp, gemma3.cpp `load_arch_hparams`.

    Args:
        model: The model.
        scalar: By the root of which its scores are divided.
        layers: The depth from which llama.cpp concludes that it is width / heads. Of any other it
            takes head_dim.
    """
    by_width = model.num_hidden_layers == layers
    taken = model.hidden_size // model.num_attention_heads if by_width else model.head_dim
    if taken == scalar:
        return []
    return [
        f"llama.cpp divides scores by sqrt({taken}) in a Gemma of {model.num_hidden_layers} "
        f"layers, this one by sqrt({scalar}); it {_SILENT}"
    ]


def dropped_of_gemma(model: ModelDescription) -> list[str]:
    """Of Gemma 1 and 2; llama.cpp conversion/gemma.py `GemmaModel`, `Gemma2Model`."""
    lines = []
    if model.rope_theta != 10_000:
        lines.append(
            f"llama.cpp's converter drops rope_theta={model.rope_theta:g} of this architecture; "
            f"llama.cpp rotates by 10000, and {_SILENT}"
        )
    if not model.tie_word_embeddings:
        lines.append(
            "llama.cpp's converter drops the output head of this architecture; llama.cpp takes the "
            f"embedding for it, and {_SILENT}"
        )
    return lines


def fixed_of_llama4(model: ModelDescription, step: int) -> list[str]:
    """llama.cpp src/models/llama4.cpp `load_arch_hparams`, SGLang srt/models/llama4.py.

    Args:
        model: The model.
        step: Its `interleave_moe_layer_step`, by its first layer with experts.
    """
    lines = []
    fixed = {
        "nope_layer_interval": 4,
        "chunk_attn_window_size": 8192,
        "temperature_tuning": True,
        "use_qk_norm": model.num_experts != 128,
    }
    own = [name for name, value in fixed.items() if model.settings[name] != value]
    if own:
        lines.append(
            f"llama.cpp has its own {', '.join(own)} for every Llama 4, and {_SILENT}"
            + ("; so has SGLang the first" if own[0] == "nope_layer_interval" else "")
        )
    if model.moe_layers != tuple(range(step - 1, model.num_hidden_layers, step)):
        lines.append(
            f"its experts are not in every layer whose number is a multiple of {step}; what does "
            "not read moe_layers, such as vLLM, places them there"
        )
    return lines


def wanted_of_olmo3(model: ModelDescription, options: Options) -> list[str]:
    """llama.cpp src/models/olmo2.cpp `load_arch_tensors`."""
    lines = []
    if tied(model, options):
        lines.append("llama.cpp loads no OLMo 3 without an output head; --untie writes it")
    if model.head_dim * model.num_attention_heads != model.hidden_size:
        lines.append(
            f"llama.cpp loads no OLMo 3 whose head_dim, {model.head_dim}, is not hidden_size / "
            "heads"
        )
    return lines


def fixed_of_gpt_oss(model: ModelDescription) -> list[str]:
    """VLLM model_executor/models/gpt_oss.py `OAIAttention`, `MLPBlock`."""
    lines = []
    if model.rope_type != "yarn":
        lines.append("vLLM loads a GPT-OSS with YaRN only")
    if model.rms_norm_eps != 1e-5:
        lines.append(
            f"vLLM has 1e-05 in every norm of a GPT-OSS, this one {model.rms_norm_eps:g}; it "
            f"{_SILENT}"
        )
    return lines


def dense_of_qwen3_moe(model: ModelDescription) -> list[str]:
    """SGLang srt/models/qwen3_moe.py `Qwen3MoeDecoderLayer`, llama.cpp src/models/qwen3moe.cpp."""
    if not model.dense_layers:
        return []
    return [
        f"{len(model.dense_layers)} of {model.num_hidden_layers} layers are dense "
        "(mlp_only_layers): SGLang takes every layer of a Qwen3-MoE for one with experts, leaves "
        f"these without weights, and {_SILENT}; llama.cpp does not load such a model"
    ]
