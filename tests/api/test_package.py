"""`import moeconv` offers the public functions, imports nothing for that, and documents them."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
from typing import get_type_hints

import cli_runner
import pytest

import moeconv
from moeconv.api.convert import PlanOptions
from moeconv.cli.main import COMMANDS

FUNCTIONS = ["convert", "list_families", "load_plan", "open_checkpoint", "plan", "push", "verify"]


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, env=cli_runner.environment(), check=True,
    )  # fmt: skip
    return ran.stdout


def test_importing_it_imports_nothing():
    code = "import sys; before = {*sys.modules}; import moeconv; print(*{*sys.modules} - before)"
    found = {name for name in python(code).split() if name.startswith("moeconv")}
    assert found == {"moeconv"}
    others = {name.split(".")[0] for name in python(code).split()} - found
    assert others <= set(sys.stdlib_module_names)


def test_a_function_imports_no_framework():
    code = (
        "import json, sys, moeconv\n"
        "for name in moeconv.__all__: getattr(moeconv, name)\n"
        "print(json.dumps([name.split('.')[0] for name in sys.modules]))"
    )
    assert not {"jax", "torch", "transformers", "numpy", "pydantic"} & set(json.loads(python(code)))


def test_it_lists_them():
    assert sorted({*FUNCTIONS, "__version__"}) == sorted(moeconv.__all__)
    assert set(moeconv.__all__) <= set(dir(moeconv))
    with pytest.raises(AttributeError, match="module 'moeconv' has no attribute 'conver'"):
        moeconv.conver  # noqa: B018


def test_no_module_takes_a_function_s_name():
    """Importing `moeconv.x` sets that attribute of the package, in the place of a function."""
    assert not {each.name for each in pkgutil.iter_modules(moeconv.__path__)} & {*FUNCTIONS}
    for each in pkgutil.walk_packages(moeconv.__path__, "moeconv."):
        if not each.name.endswith("__main__"):
            importlib.import_module(each.name)
    for name in FUNCTIONS:
        function = getattr(moeconv, name)
        assert inspect.isfunction(function) and function.__name__ == name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_is_documented(name):
    function = getattr(moeconv, name)
    text = inspect.getdoc(function)
    assert text is not None
    for parameter in inspect.signature(function).parameters.values():
        stars = {parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        assert f"\n    {stars}{parameter.name}: " in text
    assert "\nReturns:\n" in text and "\nRaises:\n" in text


def keywords(name: str) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(getattr(moeconv, name)).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_convert_takes_what_plan_takes():
    hints = get_type_hints(moeconv.plan, localns={"Plan": object})
    assert {name: hints[name] for name in keywords("plan")} == get_type_hints(PlanOptions)
    assert not keywords("plan").keys() & keywords("convert").keys()


# Command -> its functions, the options that are the command's own, and arguments that it fills.
SAME = {
    "inspect": (["open_checkpoint"], {"json_mode"}, set()),
    "convert": (
        ["plan", "convert"],
        {"json_mode", "quiet", "dry_run", "plan_file"},
        {"progress", "note", "checkpoint"},
    ),
    "verify": (["verify"], {"json_mode", "quiet", "level"}, {"levels", "progress", "note"}),
    "push": (["push"], {"json_mode", "quiet", "repo_id"}, {"note"}),
}


@pytest.mark.parametrize("command", SAME)
def test_the_options_of_a_command_are_the_arguments(command):
    functions, own, filled = SAME[command]
    options = {
        option.name: option
        for option in importlib.import_module(COMMANDS[command][0]).command.params
        if option.param_type_name == "option" and option.name not in own
    }
    arguments = {}
    for name in functions:
        arguments |= keywords(name)
    assert options.keys() == arguments.keys() - filled
    for name, option in options.items():
        default = option.to_info_dict()["default"]
        if name != "jobs":  # the number of processors, which the help names
            assert (default or None) == (arguments[name].default or None), name


def test_python_m_moeconv():
    ran = subprocess.run(
        [sys.executable, "-m", "moeconv", "--version"],
        capture_output=True, text=True, env=cli_runner.environment(), check=True,
    )  # fmt: skip
    assert moeconv.__version__ in ran.stdout
