"""Decoder blocks of MaxText that no target here holds, each with its reason.

Read in MaxText 0.2.5 and transformers 5.23. A page that holds one of them ends its refusal.
"""

from moeconv.arch.blocks import Refused

DEFAULT = Refused(
    "default",
    "it adds attention and MLP of one RMSNorm in parallel (MaxText layers/nnx_decoders.py "
    "`NNXDecoderLayer`), and the stock architectures that do so normalise by LayerNorm",
    since="0.1.0",
)
SIMPLE = Refused(
    "simple",
    "its layers are one matrix each, without attention (MaxText models/simple_layer.py "
    "`SimpleDecoderLayer`), and no stock architecture is that",
    since="0.1.0",
)
SIMPLE_MLP = Refused(
    "simple_mlp",
    "its layers are two matrices each, without attention (MaxText models/simple_layer.py "
    "`SimpleMlpDecoderLayer`), and no stock architecture is that",
    since="0.1.0",
)
DEEPSEEK4 = Refused(
    "deepseek4",
    "it attends to compressed keys, routes its first layers by the token's id, and has "
    "hyper-connections (MaxText models/deepseek4.py), and moeconv has no page for "
    "DeepseekV4ForCausalLM",
    since="0.2.4",
)
QWEN3_CUSTOM_MOE = Refused(
    "qwen3_custom_moe",
    "its attention gives the experts a vector narrower than the hidden state, without a residual "
    "of its own (MaxText models/qwen3_custom.py), and no stock architecture does that",
    since="0.2.2",
)
LEARN_TO_INIT = Refused(
    "llama2_learn_to_init",
    "it computes its weights from those of a teacher, and only MaxText 0.2.2 has it "
    "(common/common_types.py)",
    since="0.2.2",
)
