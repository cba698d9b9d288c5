"""Settings that MaxText takes without a word and that spoil the run: one table of them.

Each was seen or read in MaxText 0.2.5; the place is named. docs/memory.md and the tests use the
names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moeconv_train.preflight.case import Case
from moeconv_train.preflight.report import Finding, Status

Severity = Literal["refuse", "mend", "warn", "note"]

_STATUS: dict[Severity, Status] = {
    "refuse": "refused",
    "mend": "mended",
    "warn": "warn",
    "note": "note",
}


@dataclass(frozen=True)
class Trap:
    """One way to go wrong.

    Attributes:
        name: Of the finding.
        severity: Whether the run is refused, mended aloud, warned about, or only told.
        fires: Whether a run is in it.
        says: The sentence; `{key}` is a MaxText key or one of `Case.words`.
        mends: The settings that put it right.
    """

    name: str
    severity: Severity
    fires: Callable[[Case], bool]
    says: str
    mends: Mapping[str, Any] | Callable[[Case], Mapping[str, Any]] = field(default_factory=dict)

    def finding(self, case: Case) -> Finding:
        """What to tell of a run that is in it."""
        mends = self.mends(case) if callable(self.mends) else self.mends
        return Finding(
            check=self.name,
            status=_STATUS[self.severity],
            message=self.says.format_map(case.words()),
            mended=dict(mends),
        )


def find(case: Case) -> list[Finding]:
    """Every trap that a run is in, in the order of the table."""
    return [trap.finding(case) for trap in TRAPS if trap.fires(case)]


# Blocks whose scanned layers are repeated groups (nnx_decoders.py: the *ScannableBlock classes).
_CYCLES = {"envy", "llama4", "gemma3", "gemma4", "gpt_oss", "qwen3_next", "qwen3_5", "olmo3"}


def _open_mesh(case: Case) -> bool:
    """Whether what is left goes to FSDP: base.yml's own setting."""
    return (
        case.target.devices > 1
        and case.mesh_open == ["ici_fsdp_parallelism"]
        and case.mesh_devices != case.target.devices
    )


def _wrong_mesh(case: Case) -> bool:
    if not case.target.devices or _open_mesh(case):
        return False
    if case.mesh_open:
        return case.target.devices % case.mesh_devices != 0
    return case.mesh_devices != case.target.devices


TRAPS: tuple[Trap, ...] = (
    # The model and its tokenizer.
    Trap(
        "vocabulary",
        "refuse",
        lambda c: bool(c.tokenizer_size) and c["vocab_size"] < c.tokenizer_size,
        # embeddings.py: an index past the table reads its last row; one_hot of it is all zeros.
        "vocab_size={vocab_size} has no rows for the last ids of the tokenizer, which has "
        "{tokenizer_size}, BOS and EOS among them: they would share one embedding and train to "
        "nothing; set vocab_size={tokenizer_size}.",
    ),
    Trap(
        "layer cycle",
        "refuse",
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
    Trap(
        "token dropping",
        "warn",
        lambda c: c.moe and (c["capacity_factor"] or -1) > 0,
        "capacity_factor={capacity_factor} drops tokens in training, which no converted model "
        "does; set capacity_factor=-1.",
    ),
    # FP16 and the GPU.
    Trap(
        "bfloat16",
        "refuse",
        lambda c: c.turing and c["dtype"] == "bfloat16",
        "dtype=bfloat16 on {target}, whose tensor cores have none, computes every matmul in "
        "float32; set dtype=float16.",
    ),
    Trap(
        "loss scaling",
        "refuse",
        lambda c: c.fp16 and not c.settings.loss_scaling,
        "dtype=float16 without loss scaling flushes a quarter of the gradients to zero; turn loss "
        "scaling on (it is by default).",
    ),
    Trap(
        "weights in 16 bits",
        "refuse",
        lambda c: c["weight_dtype"] in ("float16", "bfloat16") or c["grad_dtype"] == "float16",
        "weight_dtype={weight_dtype} grad_dtype={grad_dtype} rounds away Adam's small steps; set "
        "both to float32 (dtype alone chooses what is computed in).",
    ),
    Trap(
        "spikes",
        "mend",
        lambda c: c.fp16 and bool(c["skip_step_on_spikes"]),
        # optimizers.py `skip_step_on_spikes`: a NaN is never above mean + 6 std.
        "skip_step_on_spikes=true is no guard against FP16 overflows: an early NaN is applied, a "
        "later one poisons its window; loss scaling leaves such steps out.",
        {"skip_step_on_spikes": False},
    ),
    Trap(
        "attention sums",
        "mend",
        lambda c: c.fp16 and c["attention"] == "dot_product" and not c["float32_logits"],
        # attention_op.py: softmax's sums are not normalised before they meet the values.
        "float32_logits=false lets attention overflow in FP16.",
        {"float32_logits": True},
    ),
    Trap(
        "router",
        "mend",
        lambda c: c.fp16 and c.moe and not c["float32_gate_logits"],
        "float32_gate_logits=false routes by logits of 11 bits.",
        {"float32_gate_logits": True},
    ),
    Trap(
        "logits",
        "mend",
        lambda c: c.fp16 and not c["cast_logits_to_fp32"],
        "cast_logits_to_fp32=false computes the loss in FP16.",
        {"cast_logits_to_fp32": True},
    ),
    Trap(
        "expert sums",
        "mend",
        lambda c: c.fp16 and c.moe and not c["float32_weight_sum"],
        "float32_weight_sum=false adds up the experts in FP16.",
        {"float32_weight_sum": True},
    ),
    Trap(
        "attention kernel",
        "mend",
        lambda c: c.turing and c["attention"] != "dot_product",
        "attention={attention} is a kernel that {target} cannot run.",
        {"attention": "dot_product"},
    ),
    Trap(
        "megablox",
        "mend",
        lambda c: c.moe and bool(c["megablox"]) and bool(c["sparse_matmul"]),
        # moe.py: interpret = platform != "tpu".
        "megablox=true is a TPU kernel, which GPUs run interpreted, thousands of times slower.",
        {"megablox": False},
    ),
    Trap(
        "sparse matmul",
        "mend",
        lambda c: c.turing and c.moe and bool(c["sparse_matmul"]),
        "sparse_matmul=true becomes masked dense matmuls on {target}, half as much again as "
        "computing every expert for every token.",
        {"sparse_matmul": False},
    ),
    Trap(
        "tokamax",
        "refuse",
        lambda c: c.turing and bool(c["use_tokamax_gmm"] or c["use_tokamax_splash"]),
        "use_tokamax_gmm={use_tokamax_gmm} use_tokamax_splash={use_tokamax_splash} fail on "
        "{target}; set both to false.",
    ),
    # Memory and devices.
    Trap(
        "remat",
        "refuse",
        lambda c: c["remat_policy"] in (None, "none"),
        # pyconfig.py makes None of "none"; nnx_decoders.py `get_remat_policy` makes full of None.
        "remat_policy=none means full rematerialisation to MaxText; say remat_policy=full, or "
        "minimal_with_context, which saves every matmul and costs 2 %.",
    ),
    Trap(
        "scanned layers",
        "note",
        lambda c: bool(c["scan_layers"]) and c.target.config_file is not None,
        "scan_layers=true always rematerialises and needs more memory than scan_layers=false, "
        "which compiles slower; a run is resumed with the one it began with.",
    ),
    Trap(
        "data parallel",
        "mend",
        _open_mesh,
        "ici_fsdp_parallelism=-1, MaxText's default, shards the weights over the GPUs and gathers "
        "them in every layer; the model fits on each.",
        lambda c: {
            "ici_data_parallelism": c["ici_data_parallelism"]
            * (c.target.devices // c.mesh_devices),
            "ici_fsdp_parallelism": 1,
        },
    ),
    Trap(
        "mesh",
        "refuse",
        _wrong_mesh,
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
        "refuse",
        lambda c: c.settings.batches is not None and c["steps"] > c.settings.batches,
        # train.py: StopIteration ends the loop before the last save.
        "steps={steps} is more than the {batches} batches that the data have: the run would end "
        "without its last checkpoint; set steps={batches}.",
    ),
    Trap(
        "schedule",
        "warn",
        lambda c: 0 < c.steps_of_schedule < c["steps"],
        "learning_rate_schedule_steps={learning_rate_schedule_steps} ends before steps={steps}: "
        "the rest trains at a learning rate of 0; leave it out.",
    ),
    Trap(
        "pad id",
        "refuse",
        lambda c: (
            c.pad_id == 0 and not c.settings.own_pipeline and c["dataset_type"] in ("grain", "hf")
        ),
        # data_processing_utils.py `get_tokenizer_and_pad_id`, ShiftData(ignored_ids=[pad_id]).
        "the tokenizer has no pad token, so MaxText masks every target with id 0, a common token, "
        "and it is never learnt; give the tokenizer a pad token of its own, or let moeconv data "
        "prepare the rows.",
    ),
    # What is saved and logged.
    Trap(
        "checkpoints kept",
        "mend",
        lambda c: bool(c["enable_checkpointing"]) and c["max_num_checkpoints_to_keep"] is None,
        "max_num_checkpoints_to_keep=None keeps every checkpoint until the disk is full.",
        {"max_num_checkpoints_to_keep": 2},
    ),
    Trap(
        "first checkpoint",
        "mend",
        lambda c: bool(c["enable_checkpointing"]) and bool(c["save_checkpoint_on_start"]),
        "save_checkpoint_on_start=true saves a model that has learnt nothing.",
        {"save_checkpoint_on_start": False},
    ),
    Trap(
        "bf16 export",
        "warn",
        lambda c: bool(c["force_unroll"]),
        "force_unroll=true belongs to MaxText's generate_param_only_checkpoint, which rounds the "
        "weights to bfloat16; moeconv convert reads the run's own checkpoints.",
    ),
    Trap(
        "metrics",
        "note",
        lambda c: c["eval_interval"] > 0 and bool(c["metrics_file"] or c["enable_wandb"]),
        # metric_logger.py: the running-evaluation log starts at step 0 and truncates the file.
        "MaxText truncates metrics_file and loses W&B's steps at every evaluation; moeconv train "
        "mends both, python -m maxtext.trainers.pre_train.train does not.",
    ),
    Trap(
        "no evaluation",
        "note",
        lambda c: c["eval_interval"] <= 0,
        "eval_interval={eval_interval}: the run is never evaluated.",
    ),
    Trap(
        "decoupled",
        "warn",
        lambda c: c.environment.get("DECOUPLE_GCLOUD", "").upper() == "TRUE",
        # gcloud_stub.py; max_utils.py `initialize_summary_writer`.
        "DECOUPLE_GCLOUD=TRUE keeps TensorBoard's logs out of the run's directory and is not "
        "needed; unset it.",
    ),
)
