"""Mistakes that a family's page could make: each fails at the lowest level that can see it.

A page that is wrong is wrong for convert and for verify alike, so levels structure and weights find
its output right. MaxText and transformers, which run it, do not. A tensor that is not what the page
says is seen by level weights.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import config_file, run
from maxtext_lab import (
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GPT_OSS,
    LLAMA4,
    OLMO3,
    TIED,
)
from parity_lab import Compiled, check

from moeconv.families import blocks, targets
from moeconv.hf.safetensors import read_header
from moeconv.mapping.rules import Factor, Target
from moeconv.verification.checks import Status, worst
from moeconv.verification.models.maxtext import MaxTextModel
from moeconv.verification.settings import ParityOptions

pytestmark = [pytest.mark.slow, pytest.mark.proof("mistakes of families"), pytest.mark.maxtext]
FOUR = {"base_num_decoder_layers": 4}
MODELS = {
    "gpt_oss": (GPT_OSS,),
    "llama4": (LLAMA4, FOUR),
    "olmo3": (OLMO3, FOUR),
    "gemma3": (GEMMA3, TIED),
    "gemma2": (GEMMA2, TIED),
    "gemma": (GEMMA, TIED),
    "deepseek_v3": (DEEPSEEK_V3,),
    "deepseek_v2": (DEEPSEEK_V2,),
}


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    monkeypatch.setattr("moeconv.verification.levels.layers.MaxTextLayers", Compiled)
    monkeypatch.setattr("moeconv.verification.levels.logits.MaxTextLayers", Compiled)
    monkeypatch.setattr("moeconv.verification.levels.logits.MaxTextModel.load", _loaded)


_stock = MaxTextModel.load
_models: dict[str, MaxTextModel] = {}


def _loaded(items, config, *, dtype="float32"):
    key = repr((items, sorted(config.items()), dtype))
    if key not in _models:
        _models[key] = _stock(items, config, dtype=dtype)
    return _models[key]


Page = Callable[[Target], Target]


def key(name: str, change: Callable[[Any], Any]) -> Page:
    """A page that writes another value of one key of config.json."""

    def mistaken(target: Target) -> Target:
        keys = {each.key: each for each in target.config}
        right = keys[name].value
        keys[name] = replace(keys[name], value=lambda m, o: change(right(m, o)))
        return replace(target, config=tuple(keys.values()))

    return mistaken


def rope(**changes: Any) -> Page:
    """Of RoPE's numbers, for all releases."""

    def changed(found: dict[str, Any] | None) -> dict[str, Any] | None:
        return {**(found or {}), **changes}

    return lambda target: key("rope_scaling", changed)(key("rope_parameters", changed)(target))


def rule(name: str, **changes: Any) -> Page:
    """A page with another rule for one tensor."""

    def mistaken(target: Target) -> Target:
        rules = [
            replace(each, **changes) if each.target.endswith(name) else each
            for each in target.rules
        ]
        assert rules != list(target.rules)
        return replace(target, rules=tuple(rules))

    return mistaken


def other_way(types: list[str]) -> list[str]:
    return types[1:] + types[:1]


def ropes(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Page:
    """Of the RoPE of both kinds of layer, for transformers 5."""
    return lambda target: key("rope_parameters", change)(
        key("rope_scaling", lambda found: None)(target)
    )


def _swapped(rope: dict[str, Any]) -> dict[str, Any]:
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    theta = {"rope_theta": full["rope_theta"]}, {"rope_theta": sliding["rope_theta"]}
    return {"full_attention": full | theta[1], "sliding_attention": sliding | theta[0]}


swapped_thetas = ropes(_swapped)
both_stretched = ropes(
    lambda rope: {
        **rope,
        "sliding_attention": rope["full_attention"]
        | {"rope_theta": rope["sliding_attention"]["rope_theta"]},
    }
)
none_stretched = ropes(
    lambda rope: {
        **rope,
        "full_attention": {
            "rope_type": "default", "rope_theta": rope["full_attention"]["rope_theta"]
        },
    }
)  # fmt: skip

ZERO = Factor("0", "a mistake", lambda m: 0.0)
EXPERTS = ("GptOssMlp.wi_1", "GptOssMlp.wi_0")
ROUTED = ("Llama4MoEBlock_0.MoeBlock_0.wi_1", "Llama4MoEBlock_0.MoeBlock_0.wi_0")
# The family, the page's mistake, and the first place that level layers must name.
PAGES: dict[str, tuple[str, Page, str]] = {
    "window one wider": (
        "gpt_oss", key("sliding_window", lambda n: n + 1), "layer 0 attention"),
    "window one narrower": (
        "gpt_oss", key("sliding_window", lambda n: n - 1), "layer 0 attention"),
    "windows in the other layers": ("gpt_oss", key("layer_types", other_way), "layer 0 attention"),
    "sinks as zeros": ("gpt_oss", rule(".sinks", scale=ZERO), "layer 0 attention"),
    "no bias of the output": (
        "gpt_oss", rule("o_proj.bias", scale=ZERO), "layer 0 attention"),
    "yarn's factor": ("gpt_oss", rope(factor=5.0), "layer 0 attention"),
    "yarn truncated": ("gpt_oss", rope(truncate=True), "layer 0 attention"),
    "yarn's fast end": ("gpt_oss", rope(beta_fast=5.0), "layer 0 attention"),
    "yarn's slow end": ("gpt_oss", rope(beta_slow=1.5), "layer 0 attention"),
    "yarn's scale of attention": ("gpt_oss", rope(attention_factor=1.0), "layer 0 attention"),
    "yarn's original length": (
        "gpt_oss", rope(original_max_position_embeddings=60), "layer 0 attention"),
    "the limit": ("gpt_oss", key("swiglu_limit", lambda x: 7.0), "layer 0 experts"),
    "no router bias": ("gpt_oss", rule("router.bias", scale=ZERO), "layer 0 router"),
    "gate and up swapped": (
        "gpt_oss", rule("experts.gate_up_proj", source=EXPERTS), "layer 0 experts"),
    "gate behind up": (
        "gpt_oss", rule("experts.gate_up_proj", place="E D M -> E D (g M)"), "layer 0 experts"),
    "biases of gate behind up": (
        "gpt_oss", rule("gate_up_proj_bias", place="E M -> E (g M)"), "layer 0 experts"),
    "chunks one longer": (
        "llama4", key("attention_chunk_size", lambda n: n + 1), "layer 0 attention"),
    "RoPE in every layer": (
        "llama4", key("no_rope_layers", lambda found: [1] * len(found)), "layer 3 attention"),
    "chunks in every layer": (
        "llama4", key("layer_types", lambda t: ["chunked_attention"] * len(t)),
        "layer 3 attention"),
    "no norm of queries and keys": (
        "llama4", key("use_qk_norm", lambda yes: False), "layer 0 attention"),
    "halves for pairs": (
        "llama4", lambda target: replace(target, rotary="half"), "layer 0 attention"),
    "no shared expert": (
        "llama4", rule("shared_expert.down_proj.weight", scale=ZERO), "layer 1 experts"),
    "Llama's gate and up swapped": (
        "llama4", rule("experts.gate_up_proj", source=ROUTED), "layer 1 experts"),
    "Llama's gate and up in turn": (
        "llama4", rule("experts.gate_up_proj", place="E D M -> E D (M g)"), "layer 1 experts"),
    "OLMo's window one wider": (
        "olmo3", key("sliding_window", lambda n: n + 1), "layer 0 attention"),
    "OLMo's windows one layer on": ("olmo3", key("layer_types", other_way), "layer 2 attention"),
    "no norm of keys' scale": ("olmo3", rule("k_norm.weight", scale=ZERO), "layer 0 attention"),
    "no norm behind the MLP": (
        "olmo3", rule("post_feedforward_layernorm.weight", scale=ZERO), "layer 0"),
    "scores scaled as of the 27b": (
        "gemma3", key("query_pre_attn_scalar", lambda n: 12), "layer 0 attention"),
    "Gemma's window one wider": (
        "gemma3", key("sliding_window", lambda n: n + 1), "layer 0 attention"),
    "Gemma's window one narrower": (
        "gemma3", key("sliding_window", lambda n: n - 1), "layer 0 attention"),
    "the blocks one layer longer": (
        "gemma3", key("layer_types", lambda t: t[-1:] + t[:-1]), "layer 5 attention"),
    "thetas swapped": ("gemma3", swapped_thetas, "layer 0 attention"),
    "windows stretched too": ("gemma3", both_stretched, "layer 0 attention"),
    "nothing stretched": ("gemma3", none_stretched, "layer 5 attention"),
    "Gemma's key norm without its scale": (
        "gemma3", rule("k_norm.weight", scale=ZERO), "layer 0 attention"),
    "Gemma's norms' offset": (
        "gemma3", rule("pre_feedforward_layernorm.weight", scale=None), "layer 0 experts"),
    "the final norm's offset": ("gemma3", rule("model.norm.weight", scale=None), "final norm"),
    "embeddings not scaled back": (
        "gemma3", rule("embed_tokens.weight", scale=None), "embedding"),
    "no norm behind Gemma's attention": (
        "gemma2", rule("post_attention_layernorm.weight", scale=ZERO), "layer 0"),
    "scores not capped": (
        "gemma2", key("attn_logit_softcapping", lambda x: None), "layer 0 attention"),
    "scores scaled twice": ("gemma2", rule("q_proj.weight", scale=None), "layer 0 attention"),
    "windows in the global layers": ("gemma2", key("layer_types", other_way), "layer 0 attention"),
    "the exact GELU": ("gemma3", key("hidden_activation", lambda x: "gelu"), "layer 0 experts"),
    "a Gemma's SiLU": ("gemma", key("hidden_act", lambda x: "silu"), "layer 0 experts"),
    "no correction of scores": (
        "deepseek_v3", rule("e_score_correction_bias", scale=ZERO), "layer 1 router"),
    "all groups of experts": ("deepseek_v3", key("topk_group", lambda n: 4), "layer 1 experts"),
    "larger groups of experts": ("deepseek_v3", key("n_group", lambda n: 2), "layer 1 experts"),
    "weights of experts unscaled": (
        "deepseek_v3", key("routed_scaling_factor", lambda x: 1.0), "layer 1 experts"),
    "weights of experts not normalised": (
        "deepseek_v3", key("norm_topk_prob", lambda yes: False), "layer 1 experts"),
    "no shared experts": (
        "deepseek_v3", rule("shared_experts.down_proj.weight", scale=ZERO), "layer 1 experts"),
    "DeepSeek's yarn's factor": ("deepseek_v3", rope(factor=5.0), "layer 0 attention"),
    "DeepSeek's yarn's fast end": ("deepseek_v3", rope(beta_fast=8.0), "layer 0 attention"),
    "yarn's scale of scores": (
        "deepseek_v3", rope(mscale=0.7, mscale_all_dim=0.7), "layer 0 attention"),
    "halves for DeepSeek's pairs": (
        "deepseek_v3", key("rope_interleave", lambda yes: False), "layer 0 attention"),
    "heads of values first": (
        "deepseek_v3", rule("kv_b_proj.weight", place="c H b -> (b H) c"), "layer 0 attention"),
    "V2 without shared experts": (
        "deepseek_v2", rule("shared_experts.up_proj.weight", scale=ZERO), "layer 1 experts"),
    "V2 with fewer experts": (
        "deepseek_v2", key("num_experts_per_tok", lambda n: 2), "layer 1 experts"),
    "V2 without yarn's scale of scores": (
        "deepseek_v2", rope(mscale=0.0, mscale_all_dim=0.0), "layer 0 attention"),
}  # fmt: skip


def words(found):
    return {name: each.summary for name, each in found.items()}


def each_page():
    """Their names; DeepSeek's are a proof of their own, as all together would be too long."""
    for name, (family, *_) in PAGES.items():
        marks = [pytest.mark.proof("mistakes of DeepSeek")] if "deepseek" in family else []
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("name", list(each_page()))
def test_a_mistaken_page_is_found_by_running_it(maxtext_lab, tmp_path, monkeypatch, name):
    family, mistaken, place = PAGES[name]
    monkeypatch.setitem(targets(), family, mistaken(targets()[family]))
    run(maxtext_lab.checkpoint(*MODELS[family]), tmp_path / "out")
    for level in ("structure", "weights"):
        right = check(level, tmp_path / "out")
        assert worst(right.values()) is Status.PASS, words(right)
    found = check("logits", tmp_path / "out")
    assert found["parity"].status is Status.FAIL, words(found)
    found = check("layers", tmp_path / "out")
    assert found["hidden"].status is Status.FAIL, words(found)
    assert found["hidden"].summary.split(": ")[0].endswith(place), words(found)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_an_uncapped_head_is_found_by_its_logits(maxtext_lab, tmp_path, monkeypatch, family):
    mistaken = key("final_logit_softcapping", lambda x: None)(targets()[family])
    monkeypatch.setitem(targets(), family, mistaken)
    run(maxtext_lab.checkpoint(*MODELS[family]), tmp_path / "out")
    for level in ("logits", "layers"):
        found = check(level, tmp_path / "out")
        assert found["parity"].status is Status.FAIL, words(found)
    assert found["hidden"].status is Status.PASS, words(found)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_layers_in_another_order_are_found_by_their_logits(
    maxtext_lab, tmp_path, monkeypatch, family
):
    """What is behind the blocks put before them, a pair turned round."""
    ways = [
        replace(
            way,
            segments=tuple(
                replace(each, modules=each.modules[::-1]) for each in way.segments[::-1]
            ),
        )
        for way in blocks()[family].stackings
    ]
    monkeypatch.setitem(blocks(), family, replace(blocks()[family], stackings=tuple(ways)))
    run(maxtext_lab.checkpoint(*MODELS[family]), tmp_path / "out")
    for level in ("structure", "weights"):
        right = check(level, tmp_path / "out")
        assert worst(right.values()) is Status.PASS, words(right)
    found = check("logits", tmp_path / "out")
    assert found["parity"].status is Status.FAIL, words(found)


@pytest.mark.parametrize("layers", [0, 2])
def test_dense_layers_elsewhere_are_found_by_the_structure(
    maxtext_lab, tmp_path, monkeypatch, layers
):
    mistaken = key("first_k_dense_replace", lambda n: layers)(targets()["deepseek_v3"])
    monkeypatch.setitem(targets(), "deepseek_v3", mistaken)
    run(maxtext_lab.checkpoint(*MODELS["deepseek_v3"]), tmp_path / "out")
    found = check("structure", tmp_path / "out")
    assert worst(found.values()) is Status.FAIL, words(found)


def zeroed(out, name):
    (file,) = out.glob("*.safetensors")
    spec, offset = read_header(file)[name]
    np.memmap(file, np.float32, "r+", offset=offset, shape=spec.shape)[:] = 0


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt_oss", "model.layers.2.self_attn.sinks"),
     ("gpt_oss", "model.layers.2.self_attn.q_proj.bias"),
     ("gpt_oss", "model.layers.2.mlp.router.bias"),
     ("gpt_oss", "model.layers.2.mlp.experts.gate_up_proj_bias"),
     ("gemma3", "model.layers.7.self_attn.q_norm.weight"),
     ("gemma2", "model.layers.3.post_feedforward_layernorm.weight"),
     ("gemma", "model.embed_tokens.weight"),
     ("llama4", "model.layers.1.feed_forward.shared_expert.up_proj.weight"),
     ("llama4", "model.layers.1.feed_forward.router.weight"),
     ("deepseek_v3", "model.layers.2.mlp.gate.e_score_correction_bias"),
     ("deepseek_v3", "model.layers.3.mlp.shared_experts.up_proj.weight"),
     ("deepseek_v3", "model.layers.0.self_attn.q_a_layernorm.weight"),
     ("deepseek_v2", "model.layers.1.self_attn.q_proj.weight")],
)  # fmt: skip
def test_a_tensor_that_was_lost_is_found_by_its_values(maxtext_lab, tmp_path, family, name):
    run(maxtext_lab.checkpoint(*MODELS[family]), tmp_path / "out")
    zeroed(tmp_path / "out", name)
    found = check("weights", tmp_path / "out")
    assert [c.tensors for c in found.values() if c.status is Status.FAIL] == [[name]]


@pytest.mark.parametrize(
    ("family", "told"),
    [("gpt_oss", "sliding_window_size=9"), ("gpt_oss", "rope_factor=5"),
     ("gpt_oss", "mlp_activations_limit=7"), ("olmo3", "sliding_window_size=7"),
     ("gemma3", "sliding_window_size=9"), ("gemma3", "local_rope_max_timescale=-1"),
     ("gemma3", "rope_linear_scaling_factor=1"), ("gemma3", "model_name=gemma3-27b"),
     ("gemma2", "attn_logits_soft_cap=3"), ("gemma2", "sliding_window_size=7"),
     ("llama4", "chunk_attn_window_size=17"),
     ("llama4", "nope_layer_interval=2"), ("llama4", "use_qk_norm=false"),
     ("deepseek_v3", "n_routing_groups=-1"), ("deepseek_v3", "topk_routing_group=3"),
     ("deepseek_v3", "mscale=1"), ("deepseek_v3", "rope_factor=5"),
     ("deepseek_v2", "routed_scaling_factor=1"), ("deepseek_v2", "num_experts_per_tok=2")],
)  # fmt: skip
def test_what_the_conversion_was_told_wrong_is_found(maxtext_lab, tmp_path, family, told):
    checkpoint = maxtext_lab.checkpoint(*MODELS[family])
    run(checkpoint, tmp_path / "out", sets=(told,))
    config = config_file(tmp_path / "config", checkpoint.config)
    found = check("layers", tmp_path / "out", ParityOptions(config=config))
    assert found["description"].status is Status.FAIL, words(found)
    assert told.partition("=")[0] in found["description"].summary
    assert found["hidden"].status is Status.FAIL, words(found)


def test_the_right_pages_pass(maxtext_lab, tmp_path):
    """Without which the tests above would show nothing."""
    for family, parts in MODELS.items():
        run(maxtext_lab.checkpoint(*parts), tmp_path / family)
        for level in ("logits", "layers"):
            found = check(level, tmp_path / family)
            assert found.pop("reference").status is Status.WARN
            assert worst(found.values()) is Status.PASS, words(found)
