"""Settings that MaxText takes without a word and that spoil the run: one table of them.

Each was seen or read in MaxText 0.2.5; the place is named.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeconv_train.preflight.config import mesh_axes, mesh_devices
from moeconv_train.preflight.report import Finding, Status

from moeconv.errors import TokenizerError
from moeconv.hf.tokenizer import read_tokenizer
from moeconv.untrusted import strict_json

if TYPE_CHECKING:
    from moeconv_train.plan import Plan

# MaxText's settings, and what `_facts` adds.
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Trap:
    """One way to go wrong.

    Attributes:
        name: Of the finding.
        status: Whether the run is refused, mended aloud, or warned about.
        fires: Whether a run is in it.
        says: The sentence, with `{key}` for a setting or fact.
        mends: The settings that put it right.
    """

    name: str
    status: Status
    fires: Callable[[Config], bool]
    says: str
    mends: Callable[[Config], Config] = lambda _: {}


def find(plan: "Plan") -> list[Finding]:
    """Every trap that a run is in, in the order of the table."""
    config = {**plan.config, **_facts(plan)}
    return [
        Finding(trap.name, trap.status, trap.says.format_map(config), trap.mends(config))
        for trap in TRAPS
        if trap.fires(config)
    ]


def _facts(plan: "Plan") -> Config:
    """What the traps look at besides MaxText's settings."""
    config, feed = plan.config, plan.feed
    size, pads = None, True
    path = config["tokenizer_path"] or ("" if feed.kind == "maxtext" else feed.settings.tokenizer)
    if feed.dataset is not None:
        size = feed.dataset.manifest.request.tokenizer.size
    elif path == "llama3" or str(path).endswith("tokenizer_llama3.tiktoken"):
        size = 128_256
    elif path and Path(path).is_dir():
        with contextlib.suppress(TokenizerError):  # such as others than Hugging Face's
            read = read_tokenizer(str(path), model_max_length=None)
            size = read.size
            told = strict_json.loads(read.files.get("tokenizer_config.json", b"{}"))
            pads = read.pad_token_id is not None or bool(told.get("unk_token"))
    precise = ["float32_logits", "cast_logits_to_fp32"]
    precise += ["float32_gate_logits", "float32_weight_sum"] * _moe(config)
    return {
        "target": plan.target.name,
        "devices": plan.target.devices,
        "has_bf16": plan.target.has_bf16,
        "halved": ", ".join(key for key in precise if not config[key]),
        "mesh_devices": mesh_devices(config),
        "scales_loss": plan.scales_loss,
        "batches": plan.available,
        "tokenizer_size": size,
        "masks_id_0": not pads and not feed.packed and config["dataset_type"] in ("grain", "hf"),
    }


# Blocks whose scanned layers are repeated groups (nnx_decoders.py: the *ScannableBlock classes).
_CYCLES = {"envy", "llama4", "gemma3", "gemma4", "gpt_oss", "qwen3_next", "qwen3_5", "olmo3"}


def _open_mesh(c: Config) -> bool:
    """Whether what is left goes to FSDP: base.yml's own setting."""
    left = [key for key, axis in mesh_axes(c).items() if axis == -1]
    return left == ["ici_fsdp_parallelism"] and c["mesh_devices"] != c["devices"] > 1


def _wrong_mesh(c: Config) -> bool:
    if -1 in mesh_axes(c).values():
        return bool(c["devices"] % c["mesh_devices"])
    return bool(c["mesh_devices"] != c["devices"])


def _fp16(c: Config) -> bool:
    return bool(c["dtype"] == "float16")


def _moe(c: Config) -> bool:
    return int(c["num_experts"] or 1) > 1


TRAPS: tuple[Trap, ...] = (
    # The model and its tokenizer.
    Trap(
        "vocabulary",
        "refused",
        lambda c: int(c["vocab_size"]) < (c["tokenizer_size"] or 0),
        # embeddings.py: an index past the table reads its last row; one_hot of it is all zeros.
        "vocab_size={vocab_size} has no rows for the last ids of the tokenizer, which has "
        "{tokenizer_size}, BOS and EOS among them: they would share one embedding and train to "
        "nothing; set vocab_size={tokenizer_size}.",
    ),
    Trap(
        "layer cycle",
        "refused",
        lambda c: (
            (c["inhomogeneous_layer_cycle_interval"] or 1) != 1
            and c["decoder_block"] not in _CYCLES
        ),
        # nnx_decoders.py `_init_scanned_generic`: layers / interval of them.
        "decoder_block={decoder_block} with "
        "inhomogeneous_layer_cycle_interval={inhomogeneous_layer_cycle_interval} silently builds "
        "fewer layers than base_num_decoder_layers={base_num_decoder_layers}; set "
        "inhomogeneous_layer_cycle_interval=1, or decoder_block=envy for dense and MoE layers in "
        "turn.",
    ),
    Trap(
        "interleaving",
        "warn",
        lambda c: c["decoder_block"] == "mixtral" and (c["interleave_moe_layer_step"] or 1) != 1,
        "decoder_block=mixtral makes every layer a MoE layer and ignores "
        "interleave_moe_layer_step={interleave_moe_layer_step}; use decoder_block=envy, or leave "
        "the key out.",
    ),
    # FP16 and the GPU.
    Trap(
        "bfloat16",
        "refused",
        lambda c: not c["has_bf16"] and c["dtype"] == "bfloat16",
        "dtype=bfloat16 on {target}, whose tensor cores have none, computes every matmul in "
        "float32; set dtype=float16.",
    ),
    Trap(
        "loss scaling",
        "refused",
        lambda c: _fp16(c) and not c["scales_loss"],
        "dtype=float16 without loss scaling flushes a quarter of the gradients to zero; leave out "
        "run.loss_scale.mode.",
    ),
    Trap(
        "weights in 16 bits",
        "refused",
        lambda c: c["weight_dtype"] in ("float16", "bfloat16") or c["grad_dtype"] == "float16",
        "weight_dtype={weight_dtype} grad_dtype={grad_dtype} rounds away Adam's small steps; set "
        "both to float32 (dtype alone chooses what is computed in).",
    ),
    Trap(
        "half precision",
        "mended",
        lambda c: _fp16(c) and bool(c["halved"]),
        # attention_op.py: softmax's sums are not normalised before they meet the values. moe.py:
        # the router's logits have 11 bits, as has the sum of the chosen experts.
        "{halved} off in FP16 lets sums overflow or rounds what decides.",
        lambda c: dict.fromkeys(c["halved"].split(", "), True),
    ),
    Trap(
        "attention kernel",
        "mended",
        lambda c: not c["has_bf16"] and c["attention"] != "dot_product",
        "attention={attention} is a kernel that {target} cannot run.",
        lambda _: {"attention": "dot_product"},
    ),
    Trap(
        "sparse matmul",
        "mended",
        lambda c: (
            _moe(c) and bool(c["sparse_matmul"]) and (bool(c["megablox"]) or not c["has_bf16"])
        ),
        # moe.py: interpret = platform != "tpu"; without it lax.ragged_dot, dense before Ampere.
        "sparse_matmul=true is with megablox=true a TPU kernel, which GPUs run interpreted, and "
        "without it masked dense matmuls on those without bfloat16.",
        lambda c: {"megablox": False, "sparse_matmul": bool(c["has_bf16"])},
    ),
    Trap(
        "compiler flags",
        "refused",
        lambda c: bool(c["compile_xla_flags"]),
        # train.py `train_loop` gives them to a compilation whose result it drops; the step that
        # runs is compiled anew when it is first called, without them.
        "compile_xla_flags={compile_xla_flags}: MaxText trains without them; put them into "
        "XLA_FLAGS in the environment.",
    ),
    # Memory and devices.
    Trap(
        "remat",
        "refused",
        lambda c: c["remat_policy"] in (None, "none"),
        # pyconfig.py makes None of "none"; nnx_decoders.py `get_remat_policy` makes full of None.
        "remat_policy=none means full rematerialisation to MaxText; say remat_policy=full, or "
        "minimal_with_context, which saves every matmul and costs 2 %.",
    ),
    Trap(
        "data parallel",
        "mended",
        _open_mesh,
        "ici_fsdp_parallelism=-1, MaxText's default, shards the weights over the GPUs and gathers "
        "them in every layer; the model fits on each.",
        lambda c: {
            "ici_data_parallelism": c["ici_data_parallelism"] * (c["devices"] // c["mesh_devices"]),
            "ici_fsdp_parallelism": 1,
        },
    ),
    Trap(
        "mesh",
        "refused",
        lambda c: not _open_mesh(c) and _wrong_mesh(c),
        "the mesh spans {mesh_devices} devices and the target has {devices}; set "
        "ici_data_parallelism={devices}, and gradient_accumulation_steps so that the batch stays.",
    ),
    # The data.
    Trap(
        "not resumable",
        "warn",
        lambda c: c["dataset_type"] == "hf",
        # hf_data_processing.py: no iterator that checkpointing.py could save.
        "dataset_type=hf begins its data anew at every resume, starts a worker at every "
        "evaluation, and with grain_worker_count=0 evaluates on other data the second time; "
        "prepare the data (moeconv data prepare) and use dataset_type=grain.",
    ),
    Trap(
        "steps",
        "refused",
        lambda c: c["batches"] is not None and c["steps"] > c["batches"],
        # train.py: StopIteration ends the loop before the last save.
        "steps={steps} is more than the {batches} batches that the data have: the run would end "
        "without its last checkpoint; set steps={batches}.",
    ),
    Trap(
        "pad id",
        "refused",
        lambda c: bool(c["masks_id_0"]),
        # data_processing_utils.py `get_tokenizer_and_pad_id`, ShiftData(ignored_ids=[pad_id]).
        "the tokenizer has no pad token, so MaxText masks every target with id 0, a common token, "
        "and it is never learnt; give the tokenizer a pad token of its own, or let moeconv data "
        "prepare the rows.",
    ),
    # What is saved.
    Trap(
        "checkpoints kept",
        "mended",
        lambda c: bool(c["enable_checkpointing"]) and c["max_num_checkpoints_to_keep"] is None,
        "max_num_checkpoints_to_keep=None keeps every checkpoint until the disk is full.",
        lambda _: {"max_num_checkpoints_to_keep": 2},
    ),
)
