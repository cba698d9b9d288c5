"""The gate makes the verdict again: a report that contradicts itself proves nothing."""

import json

import pytest

from moeconv.errors import UnverifiedError
from moeconv.hub.gate import demand, demand_verdict, judge
from moeconv.hub.local import Output


def edited(out, change):
    path = out / "verify.json"
    report = json.loads(path.read_text())
    change(report)
    path.write_text(json.dumps(report))
    return Output.open(out)


def drop(*names):
    def change(report):
        report["checks"] = [c for c in report["checks"] if (c["level"], c["name"]) not in names]

    return change


def set_check(level, name, /, **changes):
    def change(report):
        (check,) = [c for c in report["checks"] if (c["level"], c["name"]) == (level, name)]
        check.update(changes)

    return change


def every(report, status):
    report["checks"] = [{**c, "status": status} for c in report["checks"]]
    report["levels"] = dict.fromkeys(report["levels"], status)
    report["verdict"] = status


def named_digest(report):
    report["source"] = "0" * 64


def only(*kept):
    def change(report):
        report["checks"] = [c for c in report["checks"] if c["name"] in kept]
        report["levels"] = {c["level"]: "pass" for c in report["checks"]}

    return change


CONTRADICTIONS = {
    "a failed check": (set_check("weights", "values", status="fail"), "verdict of level weights"),
    "a failed level": (lambda r: r["levels"].update(logits="fail"), "verdict of level logits"),
    "a better verdict": (lambda r: r.update(verdict="skipped"), "its verdict is skipped"),
    "a failed verdict": (lambda r: r.update(verdict="fail"), "its verdict is fail"),
    "a level of nothing": (lambda r: r["levels"].update(layers="pass"), "level layers"),
    "a level left out": (lambda r: r["levels"].pop("structure"), "level structure"),
    "few checks": (only("parity", "reference", "values"), "lacks check"),
    "no values": (drop(("weights", "values")), "level weights lacks check values"),
    "no greedy": (drop(("logits", "greedy")), "level logits lacks check greedy"),
    "no router": (drop(("logits", "router")), "level logits lacks check router"),
    "no reference": (drop(("logits", "reference")), "level logits lacks check reference"),
    "values skipped": (set_check("weights", "values", status="skipped"), "lacks check values"),
    "a check twice": (lambda r: r["checks"].append(r["checks"][0]), "there twice"),
    "another source": (named_digest, "another checkpoint"),
    "another source read": (
        set_check("weights", "source", metrics={"digest": "1" * 64}),
        "another checkpoint",
    ),
    "an unknown check": (set_check("weights", "values", name="vibes"), "has no check 'vibes'"),
    "a check of another level": (set_check("weights", "values", level="layers"), "no check"),
    "nothing": (lambda r: r.clear(), "is no report"),
    "figures of text": (
        set_check("logits", "parity", metrics={"origin": "x", "text": {"positions": "many"}}),
        "is no report",
    ),
    "no figures": (set_check("logits", "parity", metrics={}), "is no report"),
    "a number beyond all": (set_check("logits", "parity", layer=10**30), "more than 64 bits"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_refused_before_and_after_reading(out, case):
    change, says = CONTRADICTIONS[case]
    output = edited(out, change)
    with pytest.raises(UnverifiedError, match=r"verify\.json") as early:
        demand_verdict(output)
    judgement = judge(output)
    assert not judgement.verified and judgement.report is None
    with pytest.raises(UnverifiedError) as late:
        demand(output, judgement)
    assert says in str(early.value) and says in str(late.value)


def test_everything_failed_is_no_contradiction(out):
    output = edited(out, lambda report: every(report, "fail"))
    assert "it failed" in (judge(output).problem or "")


def test_everything_skipped_proves_nothing(out):
    assert not judge(edited(out, lambda report: every(report, "skipped"))).verified


def test_what_verify_wrote_is_believed(out):
    assert judge(Output.open(out)).verified


def test_a_manifest_whose_digest_is_not_that_of_its_arrays(out):
    path = out / "moeconv_manifest.json"
    manifest = json.loads(path.read_text())
    name = next(iter(manifest["source"]["arrays"]))
    manifest["source"]["arrays"][name] = "0" * 64
    path.write_text(json.dumps(manifest))
    output = Output.open(out)
    with pytest.raises(UnverifiedError, match="another checkpoint"):
        demand_verdict(output)


def test_a_contradiction_ends_in_a_sentence(hub, push, out):
    edited(out, lambda report: report.update(verdict="fail"))
    ran = push()
    assert ran.code == UnverifiedError.exit_code and "contradicts itself" in ran.error
    assert hub.seen == []
