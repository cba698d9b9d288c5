"""What leaves the machine: no path of it, no key."""

import pytest

from moeconv.hub.account import may_write
from moeconv.hub.public import shorten, tail
from moeconv.hub.secrets import redact

SHORTENED = {
    "sidecar: /Users/ann/runs/tiny/moeconv_run.json": "sidecar: moeconv_run.json",
    "all 12 arrays of /data/run/checkpoints/3/items are": "all 12 arrays of items are",
    "the run's sidecar in /mnt/x": "the run's sidecar in x",
    "the run's own text (/mnt/x/sample.txt)": "the run's own text (sample.txt)",
    "--config ~/secret/plan.yml": "--config plan.yml",
    "gs://bucket/team/run/checkpoints/7/items": "items",
    "see https://host/a/b.json?X-Amz-Signature=abc": "see b.json",
    "/": "/",
    "1/sqrt(D) and models/models.py": "1/sqrt(D) and models/models.py",
    "D H h -> (H h) D": "D H h -> (H h) D",
    "KL 1e-6 / std": "KL 1e-6 / std",
    "embed [V, D]; 0.5/0.5": "embed [V, D]; 0.5/0.5",
}


@pytest.mark.parametrize("text", SHORTENED)
def test_paths_are_shortened(text):
    assert shorten(text, []) == SHORTENED[text]


def test_a_known_folder_with_spaces_is_taken_out():
    known = ["/Users/ann lee/my runs", "/Users/ann lee"]
    assert shorten("in /Users/ann lee/my runs/x.json, of", known) == "in x.json, of"
    assert shorten("in '/Users/ann lee'", known) == "in ''"
    assert shorten("/Users/ann leeway", known) == "ann leeway"


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/a/b/run/checkpoints/250/items", "run/checkpoints/250/items"),
        ("gs://bucket/run/checkpoints/250/items", "run/checkpoints/250/items"),
        ("/a/params/items", "params/items"),
        ("/a/params", "params"),
        ("run/checkpoints/250/items", "run/checkpoints/250/items"),
        ("https://u:p@host/run/checkpoints/3/items?sig=1", "run/checkpoints/3/items"),
    ],
)
def test_the_end_of_a_checkpoint_s_path(path, end):
    assert tail(path) == end
    assert tail(end) == end


def test_messages_are_redacted():
    text = "PUT https://s3/x?X-Amz-Signature=abc 'Authorization: Bearer hf_abcdefghij'"
    assert redact(text) == "PUT https://s3/x 'Authorization: ***"


WHO = {"name": "ann", "orgs": [{"name": "lab", "roleInOrg": "read"}, {"name": "new"}]}


def with_token(**token) -> dict:
    return {**WHO, "auth": {"accessToken": token}}


def scoped(name: str, *rights: str, kind: str = "user") -> dict:
    scope = {"entity": {"type": kind, "name": name}, "permissions": list(rights)}
    return with_token(role="fineGrained", fineGrained={"scoped": [scope]})


@pytest.mark.parametrize(
    ("who", "repo", "may"),
    [
        (with_token(role="write"), "ann/x", True),
        (with_token(role="read"), "ann/x", False),
        (with_token(role="write"), "lab/x", None),
        (with_token(role="write"), "new/x", None),
        (with_token(role="write"), "bob/x", False),
        (scoped("ann", "repo.write"), "ann/x", True),
        (scoped("ann", "repo.content.read"), "ann/x", False),
        (scoped("ann/x", "repo.write"), "ann/x", True),
        (scoped("ann/y", "repo.write"), "ann/x", False),
        (scoped("ann/x", "repo.write", kind="model"), "ann/x", True),
        (scoped("ann/x", "repo.write", kind="dataset"), "ann/x", False),
        (WHO, "ann/x", True),
    ],
)
def test_who_may_write(who, repo, may):
    found, why = may_write(who, repo)
    assert found is may
    assert bool(why) == (may is not True)
