"""What the tests of inputs share: converting a checkpoint, and what the command says of it."""

from engine_lab import tensors

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion


def converted(made, out, spec=None, **options):
    """The tensors that a checkpoint becomes, and the checkpoint as it was opened."""
    config = options.pop("config", None) or made.config_file(out.parent)
    prepared = plan_conversion(str(spec or made.run), ConvertOptions(config=config, **options))
    convert(prepared, out)
    return tensors(out), prepared.source


def as_leaf(*root, value=False, listed=False):
    """Key paths below `root`, as NNX keeps them: `listed` layers, leaves in a `value`."""

    def rename(path):
        keys = list(root)
        for key in path:
            name, _, number = key.rpartition("_")
            if listed and name == "layers" and number.isdigit():
                keys += [name, number]
            else:
                keys.append(key)
        return (*keys, "value") if value else tuple(keys)

    return rename


def warnings(opened):
    """What is said of a checkpoint."""
    return opened.resolution.warnings
