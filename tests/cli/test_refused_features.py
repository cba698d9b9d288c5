"""What no target can hold is refused by name, what may not matter is a warning."""

import json

import pytest
from refusals import changed, convert, out_of, refused

from moeconv.errors import UnsupportedError


@pytest.mark.parametrize(
    ("block", "key", "value"),
    [("envy", "use_post_ffw_norm", True), ("mixtral", "final_logits_soft_cap", 30.0),
     ("mixtral", "routed_score_func", "sigmoid"), ("envy", "use_random_routing", True),
     ("llama2", "attn_logits_soft_cap", 50.0), ("mixtral", "mlp_activations", ["gelu", "linear"]),
     ("mixtral", "rope_linear_scaling_factor", 4.0), ("mixtral", "moba", True),
     ("mixtral", "rope_type", "yarn"), ("mixtral", "attention_type", "mla"),
     ("mixtral", "attention_sink", True),
     ("mixtral", "mlp_bias", True), ("mixtral", "routed_bias", True),
     ("mixtral", "weight_sparsity_n", 2), ("mixtral", "mhc_expansion_rate", 4)],
)  # fmt: skip
def test_refused_features(made, tmp_path, block, key, value):
    checkpoint = made(tmp_path, block)
    words = (f"{key}={value}", "cannot be converted exactly")
    ran = convert(checkpoint, told={key: value})
    refused(ran, UnsupportedError, *words, out=out_of(checkpoint))


@pytest.mark.parametrize(
    ("key", "value"),
    [("capacity_factor", 1.25), ("sliding_window_size", 128), ("shared_experts", 1),
     ("quantization", "int8"), ("routed_scaling_factor", 2.5), ("attn_logits_soft_cap", 50.0),
     ("ragged_buffer_factor", 2.0), ("nope_layer_interval", 4)],
)  # fmt: skip
def test_warned_features(checkpoint, key, value):
    ran = convert(checkpoint, told={key: value})
    assert ran.code == 0
    [line] = [line for line in ran.err.splitlines() if f"{key}={value}" in line]
    assert line.startswith("warning: ")
    manifest = json.loads((out_of(checkpoint) / "moeconv_manifest.json").read_text())
    assert any(f"{key}={value}" in text for text in manifest["warnings"])


def test_ernie_on_an_irregular_pattern(tmp_path):
    """Experts on layers 1, 2 and 4 of 4."""

    def more(arrays):
        for name in list(arrays):
            if name.startswith("decoder.layers_1.MoeBlock_0"):
                arrays[name.replace("layers_1", "layers_0")] = arrays[name]
            if name.startswith("decoder.layers_0.mlp"):
                del arrays[name]

    checkpoint = changed(tmp_path, more, "envy", scanned=False)
    ran = convert(checkpoint, "--target", "ernie4_5_moe")
    words = ("layers 1, 2, 4", "use --target mixtral")
    refused(ran, UnsupportedError, *words, out=out_of(checkpoint))
    assert convert(checkpoint, "--target", "mixtral").code == 0


@pytest.mark.parametrize(
    ("block", "target", "words"),
    [("mixtral", "llama", ["whose targets are mixtral, ernie4_5_moe"]),
     ("envy", "llama", ["LlamaForCausalLM has no moe layers"]),
     ("llama2", "mixtral", ["whose targets are llama"]),
     ("llama2", "ernie4_5_moe", ["whose targets are llama"])],
)  # fmt: skip
def test_targets_that_do_not_fit(made, tmp_path, block, target, words):
    checkpoint = made(tmp_path, block)
    ran = convert(checkpoint, "--target", target)
    refused(ran, UnsupportedError, f"--target {target}", *words, out=out_of(checkpoint))
