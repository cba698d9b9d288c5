"""What the tests of plans share: a plan of some words, as the command line has them."""

from moeconv_train import plan, recipe
from moeconv_train.preflight.target import Gpu

T4 = Gpu("Tesla T4", 15 * 2**30, (7, 5))


def planned(*words, found=()):
    return plan.make(recipe.read(words), list(found))


def tiny(prepared, *words):
    return planned("tiny_cpu", f"run.data.directory={prepared}", *words)
