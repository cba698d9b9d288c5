"""The tiny recipe made smaller still, through `moeconv train`, and what its runs leave behind."""

import json
from pathlib import Path

import numpy as np

# FP16 with a loss scale that overflows at first and grows often, so that all of it is used.
TINY = {
    "base_emb_dim": 32,
    "base_num_decoder_layers": 2,
    "base_num_query_heads": 2,
    "base_num_kv_heads": 2,
    "head_dim": 16,
    "base_mlp_dim": 64,
    "base_moe_mlp_dim": 64,
    "checkpoint_period": 4,
    "max_num_checkpoints_to_keep": 2,
    "async_checkpointing": "true",
    "run.epochs": 1,
}
FP16 = {
    "dtype": "float16",
    "float32_logits": "true",
    "float32_gate_logits": "true",
    "run.loss_scale.initial": 2**24,
    "run.loss_scale.growth_interval": 3,
}
# Values that differ between two runs of the same thing.
TIMES = ("seconds", "tokens_per_second")


def words(output: Path, run_name: str, **extra: object) -> list[str]:
    """The arguments of `moeconv train` for a tiny run."""
    keys = {**TINY, "base_output_directory": output, "run_name": run_name, **extra}
    return ["tiny_cpu", *(f"{key}={value}" for key, value in keys.items())]


def metrics(run: Path) -> list[dict[str, object]]:
    """The lines of a run's metrics.jsonl, without what a clock says."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def state(run: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, by dotted name; read by tensorstore."""
    import tensorstore as ts

    items = run / "checkpoints" / str(step) / "items"
    metadata = json.loads((items / "_METADATA").read_text())
    found = {}
    for entry in metadata["tree_metadata"].values():
        keys = [str(part["key"]) for part in entry["key_metadata"]]
        if entry["value_metadata"].get("skip_deserialize"):
            continue
        spec = {
            "driver": "zarr3",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{items}/",
                "path": ".".join(keys) + "/",
            },
        }
        found[".".join(keys)] = ts.open(spec, open=True).result().read().result()
    assert any("params" in name for name in found) and any("opt_state" in name for name in found)
    return found


def assert_same(first: Path, second: Path, step: int) -> None:
    """Two runs have the same metrics, parameters and optimizer state, to the bit."""
    assert metrics(first) == metrics(second)
    one, other = state(first, step), state(second, step)
    assert set(one) == set(other)
    assert {name for name in one if one[name].tobytes() != other[name].tobytes()} == set()


class Wandb:
    """wandb's module, as far as it is used; any part may fail."""

    Settings = dict

    def __init__(self, trouble=(), log=None, finish=None):
        self.trouble, self.failing = list(trouble), {"log": log, "finish": finish}
        self.modes, self.calls, self.logged, self.finished = [], [], [], 0

    def setup(self, settings):
        self.modes.append(settings["mode"])

    def init(self, **kwargs):
        self.calls.append(kwargs)
        if self.trouble and (error := self.trouble.pop(0)):
            raise error
        return self

    def log(self, content, step):
        if error := self.failing["log"]:
            raise error
        self.logged.append((step, content))

    def finish(self):
        self.finished += 1
        if error := self.failing["finish"]:
            raise error
