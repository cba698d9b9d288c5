"""Proofs in a pytest session: which are run, and records of those that passed.

    @pytest.mark.proof("consumers", inputs=["requirements/consumers/*.txt"])

--proofs=sample     leaves out proofs whose record is current, but for the day's sample; what is not
                    current is run again, and its record renewed
--proofs=stale      renews those whose record is not current
--proofs=all, or names with commas between them, renews these
"""

import functools
import os
import platform
from collections import defaultdict
from collections.abc import Generator
from datetime import UTC, date, datetime
from typing import Any

import pytest
from proof_records import Claim, Record, read_records, sample
from proof_tree import Tree

_WORDS = ("sample", "stale", "all")
_ID = pytest.StashKey[tuple[str, str]]()
# Every proof that this process has collected.
CLAIMS = pytest.StashKey[dict[str, Claim]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--proofs", metavar="WHICH", help="sample, stale, all or names (make prove)")
    # One day for all workers, whatever the clock says later; they are given our options.
    today = datetime.now(UTC).date().isoformat()
    parser.addoption("--proofs-day", metavar="DATE", default=today, help="of the sample")


def pytest_configure(config: pytest.Config) -> None:
    proofs = _Proofs(config)
    given = config.args_source is not pytest.Config.ArgsSource.TESTPATHS
    if proofs.renews and given and not hasattr(config, "workerinput"):
        raise pytest.UsageError(f"--proofs={proofs.which} takes no paths: a proof is run whole")
    config.stash[CLAIMS] = {}
    config.pluginmanager.register(proofs, "proofs")


@pytest.hookimpl(tryfirst=True)
def pytest_itemcollected(item: pytest.Item) -> None:
    """No proof is a test of every commit."""
    if item.get_closest_marker("proof"):
        item.add_marker(pytest.mark.slow)


def claims(items: list[pytest.Item]) -> dict[str, Claim]:
    """What the marked tests claim, by the name of the proof."""
    found: defaultdict[str, defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for item in items:
        if mark := item.get_closest_marker("proof"):
            item.stash[_ID] = (mark.args[0], item.nodeid)
            found[mark.args[0]]["tests"].add(item.nodeid)
            for field, globs in mark.kwargs.items():
                found[mark.args[0]][field] |= set(globs)
    return {
        name: Claim(name=name, **{field: tuple(sorted(each)) for field, each in fields.items()})
        for name, fields in found.items()
    }


def _cpu_seconds() -> float:
    """Of this process and of those that it has started and that have ended."""
    return sum(os.times()[:4])


class _Proofs:
    """One session's; under xdist each worker has one, and the controller another."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.which: str = config.getoption("--proofs") or ""
        # Of the proofs that are to be renewed, when they were collected.
        self.digests: dict[str, str] = {}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.passed: defaultdict[str, set[str]] = defaultdict(set)
        self.failed: defaultdict[str, set[str]] = defaultdict(set)
        self.lines: list[str] = []  # said at the end
        self.used = _cpu_seconds()

    @functools.cached_property
    def left_out(self) -> set[str]:
        """Proofs whose record makes it needless to run them."""
        if self.which not in ("sample", "stale"):
            return set()
        tree = Tree(self.config.rootpath)
        current = {r.name for r in self.records.values() if r.is_current(tree)}
        if self.which == "stale":
            return current
        day = date.fromisoformat(self.config.getoption("--proofs-day"))
        return current - sample(self.records.values(), day)

    @property
    def renews(self) -> bool:
        """True if the session is there to write records."""
        return self.which not in ("", "sample")

    def _renewed(self, claims: dict[str, Claim], tree: Tree) -> dict[str, str]:
        """Digests of the proofs that are to be renewed."""
        names = {name for name in claims if self._runs(name)}
        if not self.renews:
            names -= {r.name for r in self.records.values() if r.is_current(tree)}
        return {name: claims[name].digest(tree) for name in names}

    @property
    def named(self) -> set[str]:
        """The proofs that were asked for by name."""
        return set() if self.which in ("", *_WORDS) else set(self.which.split(","))

    def _runs(self, name: str) -> bool:
        return name in self.named if self.named else name not in self.left_out

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Before anything is deselected."""
        found = self.config.stash[CLAIMS] = claims(items)
        gone = [item for item in items if _ID in item.stash and not self._runs(item.stash[_ID][0])]
        if gone:
            self.config.hook.pytest_deselected(items=gone)
            items[:] = [item for item in items if item not in set(gone)]
        # The longest first, so that two workers end together.
        items.sort(key=lambda item: -self._seconds(item))
        if self.which:
            self.digests = self._renewed(found, Tree(self.config.rootpath))

    @functools.cached_property
    def records(self) -> dict[str, Record]:
        return read_records(self.config.rootpath)

    def _seconds(self, item: pytest.Item) -> float:
        record = self.records.get(item.stash.get(_ID, ("", ""))[0])
        return record.cpu_seconds if record else 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, Any, Any]:
        report = yield
        used, self.used = self.used, _cpu_seconds()
        if _ID in item.stash:
            report.user_properties.append(("proof", (*item.stash[_ID], self.used - used)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, test, seconds = dict(report.user_properties).get("proof", ("", "", 0.0))
        self.seconds[name] += seconds
        if not report.passed or hasattr(report, "wasxfail"):
            self.failed[name].add(test)
        elif report.when == "call":
            self.passed[name].add(test)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker's answer to the controller, which has collected nothing."""
        for claim, digest in getattr(node, "workeroutput", {}).get("proofs", []):
            one = Claim.model_validate_json(claim)
            self.config.stash[CLAIMS][one.name] = one
            self.digests[one.name] = digest

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(self.config, "workeroutput"):
            found = self.config.stash[CLAIMS]
            asked = [(found[n].model_dump_json(), digest) for n, digest in self.digests.items()]
            self.config.workeroutput["proofs"] = asked
            return
        nothing = session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        if self.which == "stale" and nothing:
            session.exitstatus = pytest.ExitCode.OK
        proven = self._renew()
        if self.renews and not proven and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _renew(self) -> bool:
        """Writes the records of the proofs that passed; False if one did not."""
        tree = Tree(self.config.rootpath)
        for name, digest in sorted(self.digests.items()):
            claim = self.config.stash[CLAIMS][name]
            if missing := set(claim.tests) - (self.passed[name] - self.failed[name]):
                self.lines.append(f"not proven: {name}: {len(missing)} tests did not pass")
            elif claim.digest(tree) != digest:
                self.lines.append(f"not proven: {name}: what it depends on changed meanwhile")
            else:
                Record(
                    **claim.model_dump(),
                    date=datetime.now(UTC).date(),
                    cpu_seconds=round(self.seconds[name], 1),
                    cores=len(os.sched_getaffinity(0)),
                    python=platform.python_version(),
                    sha256=digest,
                ).write(self.config.rootpath)
                self.lines.append(f"proven: {name} in {self.seconds[name]:.0f} s")
        unknown = self.named - set(self.digests)
        self.lines += [f"not proven: {name}: there is no such proof" for name in sorted(unknown)]
        return not any(line.startswith("not proven") for line in self.lines)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.which == "sample":
            for name, record in sorted(self.records.items()):
                what = "not rerun" if name in self.left_out else "rerun"
                self.lines.append(f"{what}: {name} ({record.cpu_seconds:.0f} s on {record.date})")
        if self.lines:
            terminalreporter.section("proofs")
            terminalreporter.write_line("\n".join(self.lines))
