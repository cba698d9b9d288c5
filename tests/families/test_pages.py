"""The pages stand by themselves: nothing else in moeconv names a family."""

import ast
import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic
from checkpoints import ROWS

import moeconv
from moeconv import families
from moeconv.arch.detection import detect_layout
from moeconv.arch.keys import function_keys, keys, keys_read
from moeconv.conversion.api import ConvertOptions, convert, plan_conversion
from moeconv.errors import ConfigError, OutputError, UnsupportedError
from moeconv.families._table import families as table
from moeconv.hub.local import Output
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status, worst
from moeconv.verification.levels.weights import check_weights

SOURCE = Path(moeconv.__file__).parent
BLOCKS, TARGETS = families.blocks(), families.targets()


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Every text of a module that is no docstring."""
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def test_no_family_is_named_outside_its_page() -> None:
    names = {*BLOCKS, *TARGETS, *(target.architecture for target in TARGETS.values())}
    word = re.compile(rf"(?<![\w.-])({'|'.join(map(re.escape, sorted(names)))})(?![\w.])")
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {text!r}"
        for path in SOURCE.rglob("*.py")
        if path.parent != SOURCE / "families"
        and path.name != "special_sets.py"  # a tokenizer may be called as its model is
        for line, text in texts(path)
        if word.search(text)
    ]
    assert found == []


def test_the_pages_are_short() -> None:
    for page in families.pages():
        assert len(Path(page.__file__).read_text().splitlines()) <= 200, page.__name__


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_sound(name: str) -> None:
    block = BLOCKS[name]
    assert set(block.targets) <= TARGETS.keys()
    assert {kind.mlp for kind in block.layers} <= block.taps.mlp.keys()
    used = {*block.honours, *block.idle, *block.idle_values, *block.warns, *block.shown}
    held = {s.key for s in block.settings if keys()[s.key].kind != "size"}
    used |= {*block.demands, *block.refuses, *held}
    assert used <= function_keys().keys()
    # What is said of a setting that is not read would never be looked at.
    assert {*block.idle, *block.shown, *held} <= keys_read()[name]
    assert set(block.shown.values()) <= {kind.attention for kind in block.layers}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_sound(name: str) -> None:
    target = TARGETS[name]
    serving = [block for block in BLOCKS.values() if name in block.targets]
    assert serving, "no block has this target"
    parameters = {name for block in BLOCKS.values() for name in block.parameters()}
    assert {source for rule in target.rules for source in rule.sources} <= parameters
    keys = [key.key for key in target.config]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("scanned", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_layout_is_built_as_it_is_detected(name: str, tied: bool, scanned: bool) -> None:
    made = synthetic.layout_of(name, layers=4, tied=tied, scanned=scanned)
    found = detect_layout({a.path: a.shape for a in made.arrays}, [BLOCKS[name]])
    assert found == made


@pytest.mark.parametrize("name", synthetic.BLOCKS)
def test_an_output_passes_the_levels_that_need_no_framework(name: str, tmp_path: Path) -> None:
    checkpoint = synthetic.write(tmp_path / "run", name, tied=False)
    options = ConvertOptions(config=checkpoint.config_file())
    manifest = convert(plan_conversion(str(checkpoint.run), options), tmp_path / "out")
    assert manifest.target == BLOCKS[name].targets[0]
    candidate = Candidate.open(tmp_path / "out")
    found = check_weights(candidate, jobs=1, memory=2**30)
    assert worst(found) is Status.PASS, found


def test_every_block_and_target_is_tried() -> None:
    """A new page comes with a row in the tests' table of checkpoints (tests/checkpoints)."""
    assert synthetic.BLOCKS.keys() == BLOCKS.keys()
    usual = {TARGETS[block.targets[0]].architecture for block in BLOCKS.values()}
    assert usual <= {row.architecture for row in ROWS.values()}


PAGE = """
from dataclasses import replace
from moeconv.families.llama import BLOCK as _LLAMA, TARGET as _TARGET
BLOCK = replace(_LLAMA, name="mine", targets=("mine",))
TARGET = replace(_TARGET, name="mine", architecture="MineForCausalLM")
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """A package on the path that adds a page."""

    def install(text: str) -> None:
        (tmp_path / "my_pages.py").write_text(text)
        info = tmp_path / "mine-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[moeconv.families]\nmine = my_pages\n")
        monkeypatch.syspath_prepend(tmp_path)
        # The next page may have this one's path, size and second.
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        importlib.invalidate_caches()

    caches = (families.pages, families.blocks, families.targets, families.refused)
    for cache in caches:
        cache.cache_clear()
    yield install
    sys.modules.pop("my_pages", None)
    for cache in caches:
        cache.cache_clear()


def test_an_installed_package_adds_a_page(installed, tmp_path: Path) -> None:
    installed(PAGE)
    assert "mine" in families.blocks() and "mixtral" in families.blocks()
    checkpoint = synthetic.write(tmp_path / "run", "llama2")
    config = checkpoint.config_file(decoder_block="mine")
    manifest = convert(
        plan_conversion(str(checkpoint.run), ConvertOptions(config=config)), tmp_path / "out"
    )
    assert (manifest.target, manifest.architecture) == ("mine", "MineForCausalLM")
    [row] = [row for row in table().rows if row.decoder_block == "mine"]
    assert (row.status, row.maxtext, row.targets[0].architecture) == (
        *("converts", "0.1.0", "MineForCausalLM"),
    )


def test_an_installed_page_ends_a_refusal(installed) -> None:
    assert "simple" in families.refused()
    for cache in (families.pages, families.blocks, families.targets, families.refused):
        cache.cache_clear()
    installed(PAGE.replace('name="mine", targets', 'name="simple", targets'))
    rows = [row for row in table().rows if row.decoder_block == "simple"]
    assert [row.status for row in rows] == ["converts"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import nothing_of_the_kind", "page mine .my_pages.*cannot be imported: ModuleNotFound"),
        ("raise SystemError('no')", "cannot be imported: SystemError: no"),
        (PAGE.replace('name="mine"', 'name="llama2"', 1), "llama2 is the name of another page's"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
        (
            PAGE.replace('targets=("mine",)', 'targets=("gone",)'),
            "mine has a target gone, which no",
        ),
        (PAGE.replace('name="mine", targets', 'name="Mine", targets'), "a name with capitals"),
    ],
)
def test_a_page_that_cannot_be_used_is_one_sentence(installed, text: str, words: str) -> None:
    installed(text)
    with pytest.raises(ConfigError, match=words):
        families.blocks()


@pytest.mark.parametrize(
    ("setting", "refused"),
    [({"shared_experts": 1}, True), ({"nope_layer_interval": 4}, True),
     ({"use_qk_norm": True}, False)],
    ids=str,
)  # fmt: skip
def test_a_family_that_nobody_looked_through_fails_closed(installed, tmp_path, setting, refused):
    """Nothing was observed of its block, so every setting counts as read."""
    installed(PAGE)
    checkpoint = synthetic.write(tmp_path / "run", "llama2")

    def plan(block: str):
        config = checkpoint.config_file(decoder_block=block, **setting)
        return plan_conversion(str(checkpoint.run), ConvertOptions(config=config)).plan

    assert any("is ignored by this decoder block" in text for text in plan("llama2").warnings)
    if refused:
        with pytest.raises(UnsupportedError, match=f"{next(iter(setting))}="):
            plan("mine")
    else:  # the page says that its code does not use it
        assert any("is ignored by this decoder block" in text for text in plan("mine").warnings)


@pytest.mark.parametrize(
    ("target", "kinds"),
    [
        ("ernie4_5_moe", ["dense"] * 4),
        ("llama", None),
        ("zzz", None),
        ("", None),
        ("llama\n", None),
        ("mixtral", ["odd kind"] * 4),
        ("mixtral", ["sliding moe"] * 4),
    ],
)
def test_a_manifest_of_what_its_target_cannot_hold_is_none(tmp_path, target, kinds) -> None:
    checkpoint = synthetic.write(tmp_path / "run", "envy")
    options = ConvertOptions(config=checkpoint.config_file())
    out = tmp_path / "out"
    convert(plan_conversion(str(checkpoint.run), options), out)
    content = json.loads((out / "moeconv_manifest.json").read_text())
    content["target"] = target
    if kinds is not None:
        content["model"]["layer_kinds"]["value"] = kinds
    (out / "moeconv_manifest.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not a manifest that this moeconv can read"):
        Candidate.open(out)
    with pytest.raises(OutputError, match="not a manifest that this moeconv can read"):
        Output.open(out)
