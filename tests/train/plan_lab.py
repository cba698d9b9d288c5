"""What the tests of plans share: a plan of some words, as the command line has them."""

from moeconv_train import plan, recipe
from moeconv_train.preflight.target import Target

TWO_T4S = Target("2xTesla T4", 2, (7, 5))


def planned(*words, found=None):
    return plan.make(recipe.read(words), found)


def tiny(prepared, *words):
    return planned("tiny_cpu", f"run.data.directory={prepared}", *words)
