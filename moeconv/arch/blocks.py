"""The decoder blocks of MaxText that moeconv converts, and what only the block can tell."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """Semantics that neither shapes nor config fields hold: they are in the block's code.

    Attributes:
        name: Value of MaxText's `decoder_block`.
        query_scale_in_kernel: True when 1/sqrt(head_dim) is folded into the query kernel, so that
            the exported projection must be multiplied by sqrt(head_dim). False when the block
            passes `query_pre_attn_scalar` and scales the query explicitly
            (layers/attentions.py `init_query_w`).
        moe_width_key: Config key that sets the experts' width: models/mixtral.py uses `mlp_dim`,
            models/envy.py `moe_mlp_dim`.
        note: One line for `moeconv inspect`.
    """

    name: str
    query_scale_in_kernel: bool
    moe_width_key: str
    note: str


BLOCKS: dict[str, Block] = {
    b.name: b
    for b in (
        Block("mixtral", True, "mlp_dim", "every layer is a Mixture of Experts"),
        Block("envy", False, "moe_mlp_dim", "dense and Mixture-of-Experts layers interleaved"),
        Block("llama2", True, "mlp_dim", "every layer is dense"),
    )
}
