"""Nothing found in a model is ever run, whatever is typed at a prompt."""

import ast
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import synthetic
from cli_runner import moeconv
from outputs_lab import admit

from moeconv.conversion.api import ConvertOptions, convert, plan_conversion

ROOT = Path(__file__).parents[2]
DOOR = ROOT / "moeconv" / "verification" / "models" / "transformers_load.py"
SOURCES = [p for folder in ("moeconv", "train") for p in sorted((ROOT / folder).rglob("*.py"))]

# Methods and functions that load a model, a tokenizer or a config, or code for one.
LOADERS = {
    "from_pretrained",
    "from_config",
    "for_model",
    "load_adapter",
    "load_custom_generate",
    "get_class_from_dynamic_module",
    "get_kernel",
    "pipeline",
}
# What runs what it reads.
RUNNERS = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
# `module.function` that can, and the argument that makes it safe.
UNSAFE = {
    ("torch", "load"): None,
    ("np", "load"): "allow_pickle",
    ("numpy", "load"): "allow_pickle",
    ("os", "system"): None,
    ("yaml", "load"): "Loader",
    ("yaml", "unsafe_load"): None,
    ("yaml", "full_load"): None,
}
# Modules by a name that is not written out: (file, source of the name) and whose it is.
IMPORTS = {
    ("moeconv/__init__.py", "f'{__name__}.api.{_MODULES[name]}'"),  # a table of ours
    ("moeconv/cli/main.py", "COMMANDS[cmd_name][0]"),  # a table of ours
    ("moeconv/families/__init__.py", "f'{__name__}.{name}'"),  # our own modules
    ("moeconv/families/__init__.py", "entry.value"),  # of a package that the user installed
    ("moeconv/verification/levels/__init__.py", "f'{__name__}.{level}'"),  # our own modules
    ("moeconv/verification/run.py", "package"),  # a table of ours
    ("train/seams.py", "f'maxtext.{module}'"),  # a table of ours
    ("moeconv/hf/hub_client.py", "HttpError.__module__.split('.')[0]"),  # the hub library's own
}


def name_of(call: ast.Call) -> tuple[str | None, str]:
    """`(np, load)` of `np.load(…)`, `(None, f)` of `f(…)`."""
    function = call.func
    if isinstance(function, ast.Attribute):
        before = function.value
        return (before.id if isinstance(before, ast.Name) else None), function.attr
    return None, function.id if isinstance(function, ast.Name) else ""


def faults(source: str, path: str, *, door: bool) -> list[str]:
    """What a module does that could run, fetch or unpickle what it finds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            if any(module.split(".")[0] in PICKLES | {"peft"} for module in modules):
                found.append(f"{where} imports {modules}")
            auto = [n for n in names if n.startswith("Auto") and modules[0] == "transformers"]
            if auto and not door:
                found.append(f"{where} imports {auto}")
        if not isinstance(node, ast.Call):
            continue
        module, name = name_of(node)
        keywords = {k.arg: k.value for k in node.keywords}
        if name in LOADERS or name.startswith("Auto"):
            told = keywords.get("trust_remote_code")
            if not door:
                found.append(f"{where} calls {name}")
            elif not (isinstance(told, ast.Constant) and told.value is False):
                found.append(f"{where} calls {name} without trust_remote_code=False")
            elif name == "from_pretrained" and "local_files_only" not in keywords:
                found.append(f"{where} calls {name} without local_files_only")
        if module is None and name in RUNNERS and isinstance(node.func, ast.Name):
            found.append(f"{where} calls {name}")
        if (module, name) in UNSAFE and UNSAFE[module, name] not in keywords:
            found.append(f"{where} calls {module}.{name}")
        unknown = name == "import_module" and not isinstance(node.args[0], ast.Constant)
        if unknown and (path, ast.unparse(node.args[0])) not in IMPORTS:
            found.append(f"{where} imports a module by a name that it found")
        if isinstance(shell := keywords.get("shell"), ast.Constant) and shell.value:
            found.append(f"{where} runs a shell")
    return found


def test_only_one_module_calls_the_loaders():
    found = []
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        found += faults(path.read_text(), name, door=path == DOOR)
    assert found == []
    assert DOOR in SOURCES and len(SOURCES) > 100


@pytest.mark.parametrize(
    ("code", "door"),
    [
        ("AutoConfig.from_pretrained(x, trust_remote_code=False)", False),
        ("AutoConfig.from_pretrained(x, local_files_only=True)", True),
        ("AutoModel.from_config(c, trust_remote_code=flag)", True),
        ("type(m).from_pretrained(None, trust_remote_code=True, local_files_only=True)", True),
        ("m.from_pretrained(x, trust_remote_code=False)", True),
        ("from transformers import AutoTokenizer", False),
        ("import peft", True),
        ("import pickle", False),
        ("torch.load(f)", False),
        ("np.load(f)", False),
        ("yaml.load(f)", False),
        ("eval(text)", False),
        ("importlib.import_module(found)", False),
        ("subprocess.run(x, shell=True)", False),
    ],
)
def test_the_scan_can_fail(code, door):
    assert faults(code, "moeconv/x.py", door=door)


# --- a model that brings code -------------------------------------------------------------------

EVIL = "from pathlib import Path\nPath({mark!r}).write_text('it ran')\n"
MAP = {
    "AutoConfig": "evil.Config",
    "AutoModelForCausalLM": "evil.Model",
    "AutoTokenizer": ["evil.Slow", "evil.Fast"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("made")
    run = synthetic.write(root / "run", "mixtral")
    convert(plan_conversion(str(run.run), ConvertOptions(config=run.config_file())), root / "out")
    return root / "out"


def add(path: Path, **more: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


# What config.json says besides.
HOOKS = {
    "code": {"auto_map": MAP},
    "code of a foreign model": {"auto_map": MAP, "model_type": "evil"},
    "kernels for attention": {"_attn_implementation": "kernels-community/flash-attn"},
    "kernels for experts": {"experts_implementation": "kernels-community/moe"},
    "a quantiser": {"quantization_config": {"quant_method": "fp8"}},
    "other weights": {"transformers_weights": "evil.bin"},
}


@pytest.mark.parametrize("hook", HOOKS)
def test_code_beside_a_model_is_never_run(made, tmp_path, monkeypatch, hook):
    """At each level, as OUT and as the model that it is held against; the answer is yes."""
    evil, mark = tmp_path / "evil", tmp_path / "mark"
    shutil.copytree(made, evil)
    (evil / "evil.py").write_text(EVIL.format(mark=str(mark)))
    add(evil / "config.json", **HOOKS[hook])
    admit(evil, "config.json")
    right = tmp_path / "right"
    shutil.copytree(made, right)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    for level in ("structure", "logits", "layers"):
        ran = moeconv(
            "verify", evil, "--level", level, "--against", f"hf:{made}", "--tokens", "8", "--quiet"
        )
        assert ran.code == 1 and "Traceback" not in ran.err, ran.err
    for level in ("logits", "layers"):
        ran = moeconv("verify", right, "--level", level, "--against", f"hf:{evil}", "--tokens", "8")
        assert ran.code == 2 and "config.json has " in ran.error
    assert sys.stdin.read() == "y\n" * 100, "nobody asks"
    assert not mark.exists() and "evil" not in sys.modules


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin"])
def test_nothing_is_put_in_place_of_the_weights(made, tmp_path, name):
    """An adapter is refused; a pickle is not even opened."""
    out = tmp_path / "out"
    shutil.copytree(made, out)
    (out / name).write_text('{"base_model_name_or_path": "evil/model"}')
    args = ("--level", "logits", "--against", f"hf:{made}", "--tokens", "8")
    ran = moeconv("verify", out, *args)
    assert ran.code == (1 if name.startswith("adapter") else 0), ran.err + ran.out
    if name.endswith("bin"):
        (out / "model.safetensors").unlink()
        assert moeconv("verify", out, *args).code == 1
