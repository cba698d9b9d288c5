"""What a row of the table holds, and the settings that rows and tests share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moeconv.mapping.rules import Target

# Of MaxText, by their names in its YAML.
Settings = Mapping[str, object]
# A page's target with a mistake in it; checkpoints/mistakes.py makes them.
Mistaken = Callable[[Target], Target]

TIED: Settings = {"logits_via_embedding": True}
UNSCANNED: Settings = {"scan_layers": False}
LLAMA31: Settings = {"rope_type": "llama3.1", "max_target_length": 96}
# With these numbers the range that YaRN corrects is 1.4 to 3.5 of the 8 pairs, so each counts.
YARN: Settings = {
    "rope_type": "yarn",
    "rope_max_timescale": 200,
    "rope_factor": 4.0,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
    "beta_fast": 4,
    "beta_slow": 1,
    "rope_interleave": False,
    "rope_truncate": False,
    "rope_attention_scaling": True,
}
# The forms in which verify passes all levels for every family.
FORMS: Mapping[str, Settings] = {
    "scanned, untied": {},
    "unscanned, tied": {**UNSCANNED, **TIED},
    "scanned, tied, interleaved RoPE": {**LLAMA31, **TIED},
}


@dataclass(frozen=True)
class Row:
    """A family: its checkpoints, and what is expected of them.

    Attributes:
        name: What the ids of its tests begin with; that of its page, if it is one target's.
        architecture: Of the model that convert writes by default.
        model_type: Of the same, in its config.json.
        model: The settings of a small model with all that the family has, over `maxtext_lab.BASE`.
        cases: Further models for the matrix, by name: what differs from `model`. Scanned and
            unscanned, tied and untied, and both rotary orders should be among them.
        other_types: The model_type of those cases that do not get the row's.
        forms: The names of the `FORMS` in which MaxText has such a model; those with a RoPE that
            the block does not have are left out anyway.
        told: What a config must say of a checkpoint of `decoder_block` that is written without
            MaxText, for what shapes do not show; None where another row of the block has it.
        following: Where the first layers are of another kind than the rest: the kind of the first
            layer, and that of the others.
        pattern: The kinds of the layers, in turn, where they follow from the position.
        last: Where the last layer of each block is of another kind: that of the others, and its.
        one_width: The target has one width for shared and for routed experts.
        whole_shares: The target wants a width that is a multiple of the number of heads.
        one_kv: The target wants as many key heads in layers of global attention as in others.
        full_heads: The target wants heads that are together as wide as the model.
        mistaken_model: What differs from `model` in the tests of mistakes, so that they are fast.
        mistakes: Mistakes in the target's page, by name, with the first place that level layers
            must name.
        lost: Tensors that level weights must miss if they are zeros.
        told_wrong: Values of `--set` that level layers must find wrong.
        proof: The proof that the mistakes belong to, if rows share one; else "mistakes of NAME".
    """

    name: str
    architecture: str
    model_type: str
    model: Settings
    cases: Mapping[str, tuple[Settings, ...]] = field(default_factory=dict)
    other_types: Mapping[str, str] = field(default_factory=dict)
    forms: tuple[str, ...] = tuple(FORMS)
    told: Settings | None = None
    following: tuple[str, str] | None = None
    pattern: tuple[str, ...] = ()
    last: tuple[str, str] | None = None
    one_width: bool = False
    whole_shares: bool = False
    full_heads: bool = False
    one_kv: bool = False
    mistaken_model: Settings = field(default_factory=dict)
    mistakes: Mapping[str, tuple[Mistaken, str]] = field(default_factory=dict)
    lost: tuple[str, ...] = ()
    told_wrong: tuple[str, ...] = ()
    proof: str = ""

    @property
    def block(self) -> str:
        """MaxText's `decoder_block`."""
        return str(self.model["decoder_block"])
