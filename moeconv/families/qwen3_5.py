"""Qwen3.5 (text), which MaxText computes as Qwen3-Next, and which is written as one.

models/qwen3_5.py has Qwen3-Next's layers under other names, of any size and under any name of a
model. The architecture that transformers calls Qwen3.5 computes the same from other tensors: the
projections of its delta net are four, not two, and not in groups.
"""

from dataclasses import replace

from moeconv.arch.stacks import UNSCANNED
from moeconv.families._qwen_hybrid import LAYERED
from moeconv.families.qwen3_next import BLOCK as _NEXT

BLOCK = replace(_NEXT, name="qwen3_5", since="0.2.2", stackings=(UNSCANNED, LAYERED))
