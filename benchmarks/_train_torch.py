"""The same model as transformers has it, its plain PyTorch train step; train_step.py starts it.

python _train_torch.py SPEC     JSON in, one JSON object as the last line of stdout out

Weights, gradients and AdamW's moments in fp32; with another dtype, autocast, and in fp16 a
GradScaler: what a PyTorch user would write, and what MaxText with moeconv's loss scaling does.
"""

import contextlib
import json
import os
import sys
import time
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"


def model_of(keys: dict[str, Any]) -> Any:
    """Mixtral for the all-MoE recipe, ERNIE 4.5 MoE for the interleaved one."""
    import transformers

    common = {
        "vocab_size": keys["vocab_size"],
        "hidden_size": keys["base_emb_dim"],
        "num_hidden_layers": keys["base_num_decoder_layers"],
        "num_attention_heads": keys["base_num_query_heads"],
        "num_key_value_heads": keys["base_num_kv_heads"],
        "head_dim": keys["head_dim"],
        "max_position_embeddings": keys["max_target_length"],
        "rms_norm_eps": keys["normalization_layer_epsilon"],
        "rope_theta": float(keys["rope_max_timescale"]),
        "tie_word_embeddings": True,
        "use_cache": False,
    }
    experts, k = keys["num_experts"], keys["num_experts_per_tok"]
    if keys["decoder_block"] == "mixtral":
        config = transformers.MixtralConfig(
            **common,
            intermediate_size=keys["base_moe_mlp_dim"],
            num_local_experts=experts,
            num_experts_per_tok=k,
            sliding_window=None,
        )
        return transformers.MixtralForCausalLM(config)
    config = transformers.Ernie4_5_MoeConfig(
        **common,
        intermediate_size=keys["base_mlp_dim"],
        moe_intermediate_size=keys["base_moe_mlp_dim"],
        moe_num_experts=experts,
        moe_k=k,
        moe_num_shared_experts=0,
        moe_layer_interval=keys["interleave_moe_layer_step"],
        moe_layer_start_index=keys["interleave_moe_layer_step"] - 1,
        moe_layer_end_index=keys["base_num_decoder_layers"] - 1,
        use_bias=False,
    )
    return transformers.Ernie4_5_MoeForCausalLM(config)


def run(spec: dict[str, Any]) -> dict[str, Any]:
    """`steps` steps of forward, backward, clipping and AdamW."""
    import numpy as np
    import torch

    keys, device = spec["keys"], "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = model_of(keys).to(device).train()
    trained = [(n, p) for n, p in model.named_parameters() if "e_score_correction_bias" not in n]
    # ERNIE's correction bias is set by its own rule, not by gradients, and MaxText has none.
    optimizer = torch.optim.AdamW(
        [p for _, p in trained], lr=3e-6, weight_decay=keys["adam_weight_decay"]
    )
    dtype = getattr(torch, keys["dtype"])
    scaler = torch.amp.GradScaler(device, 2.0**15, enabled=dtype == torch.float16)
    shape = (int(keys["per_device_batch_size"]), keys["max_target_length"] + 1)
    tokens = np.random.default_rng(0).integers(0, keys["vocab_size"], shape)
    tokens = torch.from_numpy(tokens).to(device)
    seconds, cpu, losses = [], [], []
    for step in range(1 + spec["steps"]):
        begin, used = time.perf_counter(), time.process_time()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            logits = model(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), tokens[:, 1:].flatten()
        )
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), keys["gradient_clipping_threshold"])
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())  # waits for the forward pass
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - used)
        if step == 0 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
    return {
        "parameters": sum(p.numel() for _, p in trained),
        "seconds": seconds[1:],
        "cpu": cpu[1:],
        "losses": losses,
        "peak": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "how": f"{type(model).__name__}, {model.config._attn_implementation} attention, "
        f"{model.config._experts_implementation} experts",
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        result = run(json.loads(sys.argv[1]))
    print(json.dumps(result))
