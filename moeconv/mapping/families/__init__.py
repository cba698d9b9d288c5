"""The targets moeconv writes, one page each."""

from moeconv.arch.description import ModelDescription
from moeconv.arch.parameters import LayerKind
from moeconv.mapping.families.ernie4_5_moe import ERNIE4_5_MOE
from moeconv.mapping.families.llama import LLAMA
from moeconv.mapping.families.mixtral import MIXTRAL
from moeconv.mapping.rules import Family

FAMILIES: dict[str, Family] = {f.name: f for f in (MIXTRAL, ERNIE4_5_MOE, LLAMA)}


def default_family(model: ModelDescription) -> Family:
    """What `--target auto` means: Mixtral for anything with experts, Llama without."""
    return MIXTRAL if LayerKind.MOE in model.layer_kinds else LLAMA
