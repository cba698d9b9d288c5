"""An OUT that somebody else wrote: a verdict or a documented code, soon, nothing outside read."""

import json
import shutil
import time
from pathlib import Path

import pytest
from cli_runner import Ran, moeconv
from outputs_lab import admit, edit

from moeconv.untrusted import strict_json
from moeconv.verification.candidate import Candidate
from moeconv.verification.checks import Status
from moeconv.verification.levels.structure import check_structure
from moeconv.verification.report.report import Report
from moeconv.verification.run import verify
from moeconv.verification.settings import VerifyOptions

# Seconds of the processor that an answer may take, with the import of torch: each of these ran for
# minutes, or until it was killed.
SOON = 30


@pytest.fixture
def out(told, tmp_path) -> Path:
    shutil.copytree(told, tmp_path / "out")
    return tmp_path / "out"


def ran(out: Path, level: str = "structure", *args: object) -> Ran:
    begin = time.process_time()
    found = moeconv("verify", out, "--level", level, "--quiet", *args)
    assert time.process_time() - begin < SOON
    assert "Traceback" not in found.err, found.err
    if (out / "verify.json").exists():
        strict_json.loads((out / "verify.json").read_bytes())
    return found


def rewrite(out: Path, change) -> None:
    content = json.loads((out / "moeconv_manifest.json").read_text())
    change(content)
    (out / "moeconv_manifest.json").write_text(json.dumps(content))


def described(**fields):
    """The manifest tells it so, and config.json agrees where the names are the same."""

    def change(out: Path) -> None:
        rewrite(out, lambda m: [m["model"][k].update(value=v) for k, v in fields.items()])
        names = {"num_experts": "num_local_experts"}
        candidate = Candidate.open(out)
        (out / "config.json").write_text(json.dumps(candidate.wanted_config))
        assert set(fields) <= set(names) | set(candidate.wanted_config) | {"layer_kinds"}
        admit(out, "config.json")

    return change


def configured(**fields):
    def change(out: Path) -> None:
        edit(out, **fields)
        admit(out, "config.json")

    return change


DEEP: list = []
for _ in range(500):
    DEEP = [DEEP]

# What config.json or the manifest claims, with right digests; the check that fails.
HUGE = {
    "layers": (configured(num_hidden_layers=10**9), "config"),
    "experts": (configured(num_local_experts=10**7), "config"),
    "experts by another name": (configured(num_experts=10**7), "config"),
    "vocabulary": (configured(vocab_size=10**15), "config"),
    "width": (configured(hidden_size=10**300), "config"),
    "10^5 keys": (configured(**{f"k{n}": 1 for n in range(10**5)}), "config"),
    "deep": (configured(deep=DEEP), "config"),
    "experts of both": (described(num_experts=10**7), "tensors"),
    "layers of both": (described(layer_kinds=["moe"] * 10**5), "tensors"),
    "vocabulary of both": (described(vocab_size=2**31 - 1), "transformers"),
}


@pytest.mark.parametrize("name", HUGE)
def test_sizes_that_are_only_claimed_cost_nothing(out, name):
    claim, check = HUGE[name]
    claim(out)
    assert ran(out).code == 1
    report = Report.read((out / "verify.json").read_bytes())
    assert check in {c.name for c in report.checks if c.status is Status.FAIL}
    assert (out / "verify.json").stat().st_size < 10**5
    for level in ("weights",) if check == "tensors" else ("logits", "layers"):
        assert (
            ran(out, level, *(("--against", f"hf:{out}") if level != "weights" else ())).code == 1
        )


def safetensors(header: str, *, length: int | None = None, data: bytes = b""):
    def change(out: Path) -> None:
        raw = header.encode()
        size = len(raw) if length is None else length
        (out / "model.safetensors").write_bytes(size.to_bytes(8, "little") + raw + data)
        admit(out, "model.safetensors")

    return change


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def header(data: int = 4, **entries: object):
    return safetensors(json.dumps(entries), data=b"\0" * data)


HEADERS = {
    "a length of 2^60": safetensors("{}", length=2**60),
    "a length of 2^64 - 1": safetensors("{}", length=2**64 - 1),
    "overlapping": header(8, a=entry(), b=entry(offsets=(2, 6)), c=entry(offsets=(4, 8))),
    "gaps": header(12, a=entry(), b=entry(offsets=(8, 12))),
    "negative": header(4, a=entry(offsets=(-4, 0))),
    "beyond the file": header(4, a=entry(shape=(2,), offsets=(0, 8))),
    "backwards": header(4, a=entry(offsets=(4, 0))),
    "unknown dtype": header(4, a=entry(dtype="I64")),
    "dtype a list": header(4, a=entry(dtype=["F32"])),
    "not a number": safetensors('{"a": NaN}'),
    "an entry that is none": header(0, a=[]),
    "offsets that are texts": header(4, a=entry(offsets=("0", "4"))),
    "a name twice": safetensors(
        f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}', data=b"\0" * 4),
    "half a character": safetensors(
        f'{{"\\ud800": {json.dumps(entry())}}}', data=b"\0" * 4),
    "a shape of 10^5 axes": header(4, a=entry(shape=[10**4000] * 1000)),
    "10^5 tensors": header(
        0, **{f"t{n}": entry(shape=(0,), offsets=(0, 0)) for n in range(10**5)}),
    "nothing": lambda out: (out / "model.safetensors").write_bytes(b""),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_any_kind_are_a_failed_check(out, name):
    HEADERS[name](out)
    assert ran(out).code == 1
    report = Report.read((out / "verify.json").read_bytes())
    assert "tensors" in {c.name for c in report.checks if c.status is Status.FAIL}
    assert ran(out, "weights").code == 1


FOREIGN = [
    "../sibling",
    "/etc/passwd",
    "modeling_evil.py",
    "sub/config.json",
    "model/../../x.safetensors",
    "model\\x.safetensors",
    "model\n.safetensors",
    ".env",
    "verify.json",
    "model" + "x" * 5000 + ".safetensors",
    "",
    ".",
]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_manifest_that_names_what_convert_never_writes_fails(out, name, monkeypatch):
    (out.parent / "sibling").write_text("somebody's")
    (out / "modeling_evil.py").write_text("evil")
    opened = []
    monkeypatch.setattr(
        "moeconv.verification.files.open_inside",
        lambda folder, name: opened.append(name),
    )
    rewrite(out, lambda m: m["files"].update({name: {"size": 1, "sha256": "0"}}))
    found = {c.name: c for c in check_structure(Candidate.open(out))}["files"]
    assert found.status is Status.FAIL and "never writes" in found.summary
    assert opened == [], "nothing is opened by such a manifest"
    monkeypatch.undo()
    assert ran(out).code == 1
    assert name not in Report.read((out / "verify.json").read_bytes()).files


# --- the checkpoint that only the manifest names ------------------------------------------------


def test_a_model_whose_checkpoint_is_gone_gets_a_partial_verdict(out, tmp_path):
    rewrite(out, lambda m: m["source"].update(path=str(tmp_path / "gone")))
    for name in ("tokenizer.json", "tokenizer_config.json"):  # of words that no text has
        (out / name).unlink()
        rewrite(out, lambda m, name=name: m["files"].pop(name))
    whole = moeconv("verify", out)
    assert (whole.code == 0 and whole.err == "") or "error" not in whole.err
    assert "PASS: nothing is wrong at level structure" in whole.out
    assert "files have the size" in " ".join(whole.out.split()), "the table is printed"
    assert "--source gives another" in " ".join(whole.out.split())
    report = Report.read((out / "verify.json").read_bytes())
    assert set(report.levels.values()) == {Status.PASS, Status.SKIP} and not report.proves
    assert moeconv("verify", out, "--source", tmp_path / "gone").code == 2, "the user's own error"


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x", "gs://evil/x", "s3://evil/x"])
def test_no_address_is_asked_that_only_the_manifest_names(out, monkeypatch, address):
    asked = []
    monkeypatch.setattr("moeconv.verification.candidate.locate", asked.append)
    rewrite(out, lambda m: m["source"].update(path=address))
    report = verify(
        out, source=None, options=VerifyOptions(levels=("structure", "weights"), skip=True)
    )
    (skipped,) = [c for c in report.checks if c.level == "weights"]
    assert skipped.status is Status.SKIP and "--source" in skipped.summary
    assert asked == []
    monkeypatch.undo()
    alone = ran(out, "weights")
    assert alone.code == 2 and "an address that only OUT names is not contacted" in alone.error


# --- a report that somebody else wrote ----------------------------------------------------------

REPORTS = [
    b"[]",
    b"null",
    b"\xff",
    b"[" * 10**5,
    b'{"verdict": NaN}',
    {"checks": []},
    {"checks": [{"name": "parity", "metrics": {}}]},
    {"checks": [{"name": "parity", "metrics": {"all": {"kl_max": "x"}, "origin": "y"}}]},
    {"checks": [{"name": "router", "metrics": {"layers": [{"layer": 1}]}}]},
    {"checks": [{"name": "hidden", "metrics": {"places": [{"part": "attention"}]}}]},
    {"checks": [{"name": "parity", "metrics": {"text": {"positions": [1]}}}]},
]


@pytest.mark.parametrize("number", range(len(REPORTS)))
def test_an_earlier_report_of_any_kind_does_no_harm(out, number):
    """It speaks of these very bytes, so that its levels would be kept."""
    ran(out)
    content = REPORTS[number]
    if isinstance(content, dict):
        made = json.loads((out / "verify.json").read_text())
        for check in content["checks"]:
            check |= {"level": "logits", "status": "pass", "summary": "s"}
        made["checks"] = content["checks"]
        content = json.dumps(made).encode()
    (out / "verify.json").write_bytes(content)
    assert ran(out, "weights").code == 0
    assert "logits" not in json.loads((out / "verify.json").read_text())["levels"]
