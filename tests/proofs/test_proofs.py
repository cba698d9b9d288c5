"""There is a record of every proof; and how proofs are chosen, run and recorded."""

import warnings
from datetime import date, timedelta

import pytest
from proof_plugin import CLAIMS
from proof_records import BUDGET_SECONDS, Claim, Record, read_records, sample
from proof_tree import Tree

pytest_plugins = ["pytester"]


def test_every_proof_has_a_record(request):
    """As far as proofs were collected: `make test` collects them all.

    One that is not current is told of here, and run again by `make test-slow`.
    """
    config = request.config
    tree, claims = Tree(config.rootpath), config.stash[CLAIMS]
    records = read_records(config.rootpath)
    bad = claims.keys() - records.keys()
    if not any("::" in argument for argument in config.args):
        bad |= {name for name in claims.keys() & records if claims[name] != records[name].claim}
    if config.args == config.getini("testpaths"):
        gone = sorted(records.keys() - claims.keys())
        assert not gone, f"no test is of these proofs any more; delete their records: {gone}"
    again = ",".join(sorted(bad))
    assert not bad, f"these proofs have no record of their tests; run `make prove ONLY='{again}'`"
    if old := sorted(name for name, record in records.items() if not record.is_current(tree)):
        warnings.warn(
            f"what these proofs depend on has changed; `make prove ONLY='{','.join(old)}'` renews "
            "their records, and until then `make test-slow` runs them again",
            stacklevel=1,
        )


def test_a_record_that_is_longer_than_the_sample_should_be_two(request):
    for record in read_records(request.config.rootpath).values():
        assert record.cpu_seconds < BUDGET_SECONDS, record.name


# --- the sample ------------------------------------------------------------------------------

DAY = date(2026, 1, 1)


def record(name, seconds, age=0):
    rest = {"cores": 2, "python": "3.12", "sha256": ""}
    return Record(name=name, tests=("t",), date=DAY - timedelta(age), cpu_seconds=seconds, **rest)


RECORDS = [record(f"p{n}", seconds, age=n) for n, seconds in enumerate([90, 70, 200, 30, 5, 119])]


def test_every_proof_has_its_turn_and_the_budget_is_kept():
    seconds = {each.name: each.cpu_seconds for each in RECORDS}
    days = [sample(RECORDS, DAY + timedelta(n), budget=240) for n in range(4)]
    assert set.union(*days) == set(seconds)
    assert all(0 < sum(seconds[name] for name in day) <= 240 for day in days)
    # One that is longer than the budget has its turn all the same.
    assert any("p2" in sample(RECORDS, DAY + timedelta(n), budget=100) for n in range(6))


def test_what_was_renewed_last_is_run_again_first():
    days = [sample(RECORDS, DAY + timedelta(n), budget=300) for n in range(20)]
    counts = {name: sum(name in day for day in days) for name in ("p0", "p5")}
    assert counts["p0"] > counts["p5"] > 0
    assert days[0] == sample(list(reversed(RECORDS)), DAY, budget=300)


def test_of_proofs_renewed_on_one_day_others_are_first_on_another():
    same = [record(f"p{n}", 60) for n in range(8)]
    assert len({frozenset(sample(same, DAY + timedelta(8 * n))) for n in range(9)}) > 1


# --- what a proof depends on -----------------------------------------------------------------

FILES = {
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["tests"]\ntestpaths = ["tests"]\n'
    'markers = ["slow: s", "proof(name): p"]\n',
    "requirements/dev.txt": "numpy==2\n",
    "moeconv/__init__.py": "",
    "moeconv/core.py": '"""Doc."""\nfrom moeconv import deep\n\n\ndef f():\n    return deep.X\n',
    "moeconv/deep.py": "X = 1\n",
    "moeconv/lazy.py": "import moeconv.never\n",
    "moeconv/never.py": "",
    "moeconv/data/table.json": "{}",
    "train/__init__.py": "",
    "train/step.py": "",
    "tests/helper.py": 'SCRIPT = "script.py"\nMODULE = "moeconv_train.step:main"\n',
    "tests/script.py": "",
    "tests/a/conftest.py": "",
    "tests/a/test_a.py": "from helper import SCRIPT\nfrom moeconv.core import f\n",
    "tests/proofs/README": "",
    "configs/one.yml": "a: 1\n",
}
CLAIM = Claim(name="it", tests=("tests/a/test_a.py::test_it",), inputs=("configs/*.yml",))


@pytest.fixture
def checkout(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "changed",
    ["tests/a/test_a.py", "tests/a/conftest.py", "tests/helper.py", "tests/script.py",
     "moeconv/__init__.py", "moeconv/core.py", "moeconv/deep.py", "moeconv/data/table.json",
     "train/step.py", "requirements/dev.txt", "configs/one.yml", "configs/two.yml"],
)  # fmt: skip
def test_a_record_is_stale_when_this_changes(checkout, changed):
    before = CLAIM.digest(Tree(checkout))
    with (checkout / changed).open("a") as file:
        file.write("\nchanged = 1\n")
    assert CLAIM.digest(Tree(checkout)) != before


def test_a_record_outlives_comments_docstrings_and_what_it_does_not_need(checkout):
    before = CLAIM.digest(Tree(checkout))
    (checkout / "moeconv" / "lazy.py").write_text("changed = 1\n")
    core = checkout / "moeconv" / "core.py"
    core.write_text(
        'from moeconv import deep  # why\n\n\ndef f():\n    """Doc."""\n    return deep.X\n'
    )
    assert CLAIM.digest(Tree(checkout)) == before


@pytest.mark.parametrize("page", ["one", "two"])
def test_modules_that_a_package_finds_by_itself_are_needed(checkout, page):
    pages = checkout / "moeconv" / "pages"
    pages.mkdir()
    (pages / "__init__.py").write_text(
        "import importlib, pkgutil\n"
        "ALL = [importlib.import_module(f'{__name__}.{m.name}') for m in "
        "pkgutil.iter_modules(__path__)]\n"
    )
    for name in ("one", "two"):
        (pages / f"{name}.py").write_text("")
    with (checkout / "moeconv" / "core.py").open("a") as file:
        file.write("from moeconv.pages import ALL\n")
    before = CLAIM.digest(Tree(checkout))
    (pages / f"{page}.py").write_text("changed = 1\n")
    assert CLAIM.digest(Tree(checkout)) != before


def test_what_type_checkers_alone_import_is_not_needed(checkout):
    with (checkout / "moeconv" / "core.py").open("a") as file:
        file.write(
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import moeconv.never\n"
        )
    before = CLAIM.digest(Tree(checkout))
    (checkout / "moeconv" / "never.py").write_text("changed = 1\n")
    assert CLAIM.digest(Tree(checkout)) == before


def test_a_module_that_is_named_and_not_imported_is_left_out(checkout):
    named = CLAIM.model_copy(update={"without": ("train/step.py",)})
    before = named.digest(Tree(checkout))
    assert before != CLAIM.digest(Tree(checkout))
    (checkout / "train" / "step.py").write_text("changed = 1\n")
    assert named.digest(Tree(checkout)) == before
    missing = CLAIM.model_copy(update={"without": ("train/gone.py",)})
    with pytest.raises(FileNotFoundError, match=r"no file fits train/gone\.py"):
        missing.digest(Tree(checkout))


# --- a session ---------------------------------------------------------------------------------

PROOF = """import pytest

@pytest.mark.proof("it", inputs=["configs/*.yml"])
@pytest.mark.parametrize("n", [1, 2])
def test_it(n):
    {}

def test_of_every_commit():
    pass
"""


@pytest.fixture
def session(pytester, monkeypatch):
    """Runs pytest with some options in a small checkout, in this process."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    for name, text in FILES.items():
        path = pytester.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(body, *options):
        (pytester.path / "tests" / "a" / "test_a.py").write_text(PROOF.format(body))
        done = pytester.runpytest_inprocess("-p", "proof_plugin", *options)
        return done, read_records(pytester.path).get("it")

    return run


@pytest.mark.parametrize("which", ["all", "stale", "it"])
def test_a_run_that_passes_is_recorded(session, pytester, which):
    done, found = session("assert n", "-m", "proof", "--proofs", which)
    done.assert_outcomes(passed=2, deselected=1)
    assert found.tests == tuple(f"tests/a/test_a.py::test_it[{n}]" for n in (1, 2))
    assert found.is_current(Tree(pytester.path)) and found.cores and found.cpu_seconds < 60
    assert done.ret == 0 and "proven: it in 0 s" in done.outlines


@pytest.mark.parametrize(
    ("body", "options"),
    [
        ("assert n == 1", []),
        ("n == 1 or pytest.skip()", []),
        ("n == 1 or pytest.xfail()", []),
        ("assert n", ["-k", "1"]),
        ("open('configs/two.yml', 'w').close()", []),
    ],
)
def test_a_run_that_does_not_pass_whole_is_not_recorded(session, body, options):
    done, found = session(body, "-m", "proof", "--proofs", "all", *options)
    assert found is None and done.ret != 0
    done.stdout.fnmatch_lines("not proven: it: *")


def test_a_part_of_the_tests_is_not_recorded(session, pytester):
    done, found = session("assert n", "--proofs", "all", "tests/a/test_a.py::test_it[1]")
    assert found is None and done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines("*--proofs=all takes no paths: a proof is run whole")


def test_a_proof_that_nobody_has_is_an_error(session):
    done, _ = session("assert n", "-m", "proof", "--proofs", "its")
    done.stdout.fnmatch_lines("not proven: its: there is no such proof")
    assert done.ret != 0


def test_what_is_proven_is_run_again_in_a_sample_only(session, monkeypatch):
    session("assert n", "-m", "proof", "--proofs", "all")
    for which, ran in {"stale": 0, "sample": 2, "all": 2}.items():
        done, _ = session("assert n", "-m", "proof", "--proofs", which)
        done.assert_outcomes(passed=ran, deselected=3 - ran)
        assert done.ret == 0
    monkeypatch.setattr("proof_plugin.sample", lambda *_: set())
    done, _ = session("assert n", "-m", "slow", "--proofs", "sample")
    done.assert_outcomes(deselected=3)
    done.stdout.fnmatch_lines("not rerun: it (0 s on *)")
    done, _ = session("assert n or True", "-m", "slow", "--proofs", "sample")
    done.assert_outcomes(passed=2, deselected=1)


@pytest.mark.parametrize(("body", "proven"), [("assert n", True), ("assert n == 1", False)])
def test_what_has_changed_is_run_again_and_renewed(session, pytester, monkeypatch, body, proven):
    _, before = session("assert n", "-m", "proof", "--proofs", "all")
    monkeypatch.setattr("proof_plugin.sample", lambda *_: set())
    (pytester.path / "configs" / "one.yml").write_text("changed")
    done, found = session(body, "-m", "slow", "--proofs", "sample")
    done.assert_outcomes(passed=1 + proven, failed=1 - proven, deselected=1)
    assert found.is_current(Tree(pytester.path)) is proven
    assert (found.sha256 == before.sha256) is not proven


def test_a_proof_is_no_test_of_every_commit(session):
    done, _ = session("assert n", "-m", "not slow")
    done.assert_outcomes(passed=1, deselected=2)
