"""The model in float64 numpy, from the stored parameters; shares no code with MaxText."""

import numpy as np

TOKENS = np.random.default_rng(7).integers(0, 160, (2, 24), dtype=np.int32)

# fp32 against float64, on logits of std 1 (the largest is about 4). The CPU's vector width orders
# the sums: 7e-6 to 1.03e-5 were seen. A mistake in the mathematics is 0.1 and more.
EXACT = 2e-5


def dense_logits(params, config, tokens, *, rounded_head=False):
    """The model in float64, from the stored parameters; shares no code with MaxText."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    heads, kv = config["base_num_query_heads"], config["base_num_kv_heads"]
    head, depth = config["head_dim"], config["base_num_decoder_layers"]
    interleaved = config["decoder_block"] == "envy"
    scanned, axis = config.get("scan_layers", True), config.get("param_scan_axis", 1)
    x = p["token_embedder.embedding"][tokens]
    _, length, width = x.shape
    half = np.arange(head // 2) * 2 / head
    angle = np.arange(length)[:, None] / config["rope_max_timescale"] ** half
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def norm(x, scale):
        mean = (x * x).mean(-1, keepdims=True)
        return x / np.sqrt(mean + config["normalization_layer_epsilon"]) * scale

    def rotate(x):
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def silu(x):
        return x / (1 + np.exp(-x))

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    for layer in range(depth):

        def of(name, layer=layer):
            if not scanned:
                return p[f"decoder.layers_{layer}.{name}"]
            if interleaved:
                return p[f"decoder.layers.layers_{layer % 2}.{name}"].take(layer // 2, axis)
            return p[f"decoder.layers.{name}"].take(layer, axis)

        y = norm(x, of("pre_self_attention_layer_norm.scale"))
        q = rotate(np.einsum("btd,dhk->bthk", y, of("self_attention.query.kernel")))
        k = rotate(np.einsum("btd,dhk->bthk", y, of("self_attention.key.kernel")))
        v = np.einsum("btd,dhk->bthk", y, of("self_attention.value.kernel"))
        k, v = (np.repeat(part, heads // kv, axis=2) for part in (k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k)
        if interleaved:
            scores /= np.sqrt(head)
        scores[..., np.triu(np.ones((length, length), bool), 1)] = -np.inf
        mixed = np.einsum("bhts,bshk->bthk", softmax(scores), v)
        x = x + np.einsum("bthk,hkd->btd", mixed, of("self_attention.out.kernel"))
        y = norm(x, of("post_self_attention_layer_norm.scale"))
        if config["num_experts"] == 1 or (interleaved and layer % 2 == 0):
            gate, up, down = (of(f"mlp.{name}.kernel") for name in ("wi_0", "wi_1", "wo"))
            x = x + (silu(y @ gate) * (y @ up)) @ down
            continue
        gate, up, down = (of(f"MoeBlock_0.{name}") for name in ("wi_0", "wi_1", "wo"))
        route = y @ of("MoeBlock_0.gate.kernel")
        worst = np.sort(route, -1)[..., [-config["num_experts_per_tok"]]]
        weight = softmax(np.where(route >= worst, route, -np.inf))
        every = silu(np.einsum("btd,edf->btef", y, gate)) * np.einsum("btd,edf->btef", y, up)
        x = x + np.einsum("bte,btef,efd->btd", weight, every, down, optimize=True)
    x = norm(x, p["decoder.decoder_norm.scale"])
    if not config.get("logits_via_embedding"):
        return x @ p["decoder.logits_dense.kernel"]
    table = params["token_embedder.embedding"]
    if rounded_head:
        table = table.astype("bfloat16")
    scale = np.sqrt(width) if config.get("normalize_embedding_logits", True) else 1.0
    return x @ table.astype(np.float64).T / scale


def distance(a, b):
    return float(np.abs(np.asarray(a, np.float64) - b).max())
