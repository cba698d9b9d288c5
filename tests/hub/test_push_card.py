"""The card: everything that is known, nothing that is not, and a user's README left as it is."""

import hashlib
import json
import math
import re

import cli_runner
import outputs
import pytest
import yaml
from huggingface_hub import ModelCard

from moeconv.arch.counts import count
from moeconv.families import blocks
from moeconv.hf.safetensors import read_header
from moeconv.hub.local import Output
from moeconv.hub.metadata import assemble, is_ours, join, renew
from moeconv.hub.plot import draw_losses

OURS = {
    "license": "cdla-sharing-1.0",
    "language": "en",
    "library_name": "transformers",
    "pipeline_tag": "text-generation",
    "tags": ["maxtext", "moe", "moeconv", "mixtral"],
    "datasets": ["roneneldan/TinyStories"],
}


def metadata(card: str) -> dict:
    return yaml.safe_load(re.match(r"---\n([\s\S]*?)\n---\n", card)[1])


def table(card: str) -> dict[str, str]:
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|$", card, re.MULTILINE)
    return dict(rows)


def dry_card(out, *args: object) -> str:
    ran = cli_runner.moeconv("push", out, "--dry-run", "--json", *args)
    assert ran.code == 0, ran.err
    return json.loads(ran.out)["card"]


def test_the_card_of_a_run_that_tells_of_itself(hub, out):
    card = dry_card(out)
    told = metadata(card)
    index = told.pop("model-index")
    assert told == OURS
    (model,) = index
    (result,) = model["results"]
    assert model["name"] == "model"
    assert result["task"]["type"] == "text-generation"
    assert result["dataset"]["type"] == "roneneldan/TinyStories"
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    # Evaluations after steps 4, 8 and, later than the converted step, 12.
    assert values["loss"] == pytest.approx(math.log(8), rel=1e-5)
    assert values["perplexity"] == pytest.approx(8, rel=1e-4)
    rows = table(card)
    assert rows["data"] == (
        "[roneneldan/TinyStories](https://huggingface.co/datasets/roneneldan/TinyStories)"
    )
    assert rows["MaxText"] == "0.2.5"
    assert rows["steps"] == "8" and rows["epochs"] == "2"
    assert rows["tokens"] == "4,000"
    assert rows["peak learning rate"] == "3e-05"
    assert "packing" not in rows  # of MaxText's own packing: rows come packed
    assert rows["layers"] == "4, MoE on 2, 4, dense on the others"
    assert rows["RoPE"] == "θ = 500,000"
    assert "| training | 8 | 2.0000 | 7.389 |" in card
    assert "![Loss of training and evaluation](training_loss.png)" in card
    assert "**PASS: the converted model is the one that was trained" in card
    assert "never-told" not in card and "secret" not in card
    assert ModelCard(card).data.license == "cdla-sharing-1.0"


def test_parameters_are_counted(out):
    output = Output.open(out)
    counts = count(output.model, blocks()[output.model.decoder_block])
    config = json.loads((out / "config.json").read_text())
    tensors = {}
    for path in out.glob("*.safetensors"):
        for name, (spec, _) in read_header(path).items():
            tensors[name] = math.prod(spec.shape)
    dense = [n for n, kind in enumerate(output.model.layer_kinds) if kind == "dense"]
    experts = config["num_local_experts"]
    total, active = 0.0, 0.0
    for name, size in tensors.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers") else None
        if layer in dense and "block_sparse_moe" in name:
            # The same MLP in every expert, behind a router that was not there.
            share = 0 if "gate" in name else 1 / experts
            total, active = total + share * size, active + share * size
        else:
            expert = ".experts." in name
            total += size
            active += size * (config["num_experts_per_tok"] / experts if expert else 1)
    assert (counts.total, counts.active) == (total, active)
    card = dry_card(out, "--repo-id", "a/b")
    assert table(card)["parameters"] == f"{counts.total:,}"
    assert table(card)["parameters that a token uses"] == f"{counts.active:,}"
    assert table(card)["numbers in the files"] == f"{sum(tensors.values()):,}"


def test_nothing_is_invented_of_a_run_that_tells_nothing(hub, tmp_path):
    run = outputs.write_run(tmp_path / "run")
    config = json.loads((run / "moeconv_run.json").read_text())["config"]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    (run / "moeconv_run.json").unlink()
    (run / "metrics.jsonl").unlink()
    out = outputs.convert_run(run, tmp_path / "bare", config=tmp_path / "config.yml")
    assert json.loads((out / "moeconv_manifest.json").read_text())["run"] is None
    ran = cli_runner.moeconv("push", out, "--dry-run", "--json", "--repo-id", "alice/bare")
    card = json.loads(ran.out)["card"]
    assert set(metadata(card)) == {"library_name", "pipeline_tag", "tags"}
    assert "which license the model has" in ran.err
    for word in ("TinyStories", "learning rate", "training_loss", "| tokens |", "last loss"):
        assert word not in card
    assert table(card)["steps"] == "8"
    assert "There is no tokenizer" in card and "AutoTokenizer" not in card
    licensed = dry_card(out, "--repo-id", "alice/bare", "--license", "mit")
    assert metadata(licensed)["license"] == "mit"


def test_the_licenses_of_tokenizer_and_data_stand_beside_the_model_s(hub, tmp_path):
    """As far as the run states them."""
    facts = {**outputs.FACTS, "license": "apache-2.0"}
    told = {"tokenizer_license": "Meta Llama 3 Community License", "data_license": "CDLA <1.0>"}
    run = outputs.write_run(tmp_path / "run", facts={**facts, **told})
    card = dry_card(outputs.convert_run(run, tmp_path / "both"))
    assert metadata(card)["license"] == "apache-2.0"
    assert "## Licenses" in card
    rows = table(card)
    assert rows["the model"] == "apache-2.0"
    assert rows["its tokenizer"] == "Meta Llama 3 Community License"
    assert rows["the training data"] == r"CDLA \<1.0\>"
    # Another tokenizer than the run's.
    other = outputs.tokenizer(tmp_path / "tokenizer")
    card = dry_card(outputs.convert_run(run, tmp_path / "other", tokenizer=str(other)))
    assert table(card)["its tokenizer"] == "not stated" and "Meta" not in card
    # A run that says nothing of them.
    run = outputs.write_run(tmp_path / "silent", facts=facts)
    assert "## Licenses" not in dry_card(outputs.convert_run(run, tmp_path / "none"))


def test_a_license_that_the_hub_s_card_names_is_not_asked_for(hub, tmp_path):
    run = outputs.write_run(tmp_path / "run", facts={**outputs.FACTS, "license": None})
    out = outputs.convert_run(run, tmp_path / "out")
    ran = cli_runner.moeconv("push", out, "--unverified", "--license", "mit")
    assert ran.code == 0, ran.err
    again = cli_runner.moeconv("push", out, "--unverified")
    assert again.code == 0 and "which license" not in again.err
    assert metadata(hub.text("README.md"))["license"] == "mit"


def test_an_earlier_step_is_not_told_as_the_whole_run(hub, tmp_path):
    facts = {**outputs.FACTS, "steps": 5000, "dataset": "/data/private corpus"}
    run = outputs.write_run(tmp_path / "run", facts=facts)
    card = dry_card(outputs.convert_run(run, tmp_path / "early"))
    rows = table(card)
    assert rows["steps"] == "8 of 5,000" and "epochs" not in rows
    # What is no dataset of the Hub is not made one.
    assert "private corpus" not in card and "datasets" not in metadata(card)
    assert "model-index" not in metadata(card)


def test_the_same_output_gives_the_same_card_and_plot(hub, out, monkeypatch):
    monkeypatch.setattr("moeconv.hub.prepare.draw_losses", draw_losses)  # twice
    assert dry_card(out) == dry_card(out)
    first = cli_runner.moeconv("push", out, "--dry-run", "--json")
    second = cli_runner.moeconv("push", out, "--dry-run", "--json")
    assert json.loads(first.out)["files"] == json.loads(second.out)["files"]


# A README that is there --------------------------------------------------------------------------

THEIRS = (
    "---\nlicense: apache-2.0\ntags:\n- stories\nmy_key: 7\n---\n# My model\r\n\r\nWith  care.\n"
)


def test_a_readme_in_out_is_kept(hub, push, out):
    (out / "README.md").write_bytes(THEIRS.encode())
    ran = push()
    assert ran.code == 0, ran.err
    card = hub.text("README.md")
    assert card.endswith("---\n# My model\r\n\r\nWith  care.\n")
    told = metadata(card)
    assert told["license"] == "apache-2.0" and told["my_key"] == 7
    assert told["tags"] == ["stories", *OURS["tags"]]
    assert told["datasets"] == OURS["datasets"] and "model-index" in told
    assert (out / "README.md").read_bytes() == THEIRS.encode()


def test_a_readme_without_metadata_is_kept(hub, push, out):
    (out / "README.md").write_text("just words\n")
    assert push().code == 0
    card = hub.text("README.md")
    assert card.endswith("---\njust words\n") and metadata(card)["license"] == "cdla-sharing-1.0"


def test_a_readme_on_the_hub_is_kept(hub, push):
    repo = hub.store.create("alice/model", private=False)
    hub.store.write(repo, {"README.md": THEIRS.encode()})
    assert push().code == 0
    card = hub.text("README.md")
    assert card.endswith("With  care.\n") and "maxtext" in metadata(card)["tags"]
    assert push("--license", "mit").code == 0
    assert metadata(hub.text("README.md"))["license"] == "mit"


def test_our_card_is_renewed_until_somebody_edits_it(hub, push, out):
    assert push().code == 0
    repo, card = hub.repo(), hub.text("README.md")
    assert is_ours(card)
    with_key = card.replace("---\n", "---\nthumbnail: x.png\n", 1)
    hub.store.write(repo, {"README.md": with_key.encode()})
    outputs.attest(out, outputs.parity(3e-3))
    assert push().code == 0
    renewed = hub.text("README.md")
    assert "**WARN" in renewed and metadata(renewed)["thumbnail"] == "x.png"
    edited = renewed.replace("## Training", "## How I trained it")
    assert not is_ours(edited)
    hub.store.write(repo, {"README.md": edited.encode()})
    outputs.attest(out, outputs.parity(1e-6))
    assert push().code == 0
    kept = hub.text("README.md")
    assert "## How I trained it" in kept and "**WARN" in kept


def test_unverified_marks_a_readme_that_is_kept_too_and_a_verdict_takes_the_mark_away(
    hub, push, out
):
    (out / "README.md").write_text(THEIRS)
    report = (out / "verify.json").read_bytes()
    (out / "verify.json").unlink()
    assert push("--unverified").code == 0
    card = hub.text("README.md")
    assert "unverified" in metadata(card)["tags"]
    (out / "README.md").write_text(card)
    (out / "verify.json").write_bytes(report)
    assert push().code == 0
    assert "unverified" not in metadata(hub.text("README.md"))["tags"]


@pytest.mark.parametrize(
    "broken", ["---\ntags: [\n---\n", "---\n- a list\n---\n", "---\n: :\n---\n"]
)
def test_metadata_that_cannot_be_read_are_named(hub, push, out, broken):
    (out / "README.md").write_text(broken)
    ran = push()
    assert ran.code == 7 and "README.md" in ran.error and "mend it" in ran.error
    assert hub.store.repos == {}


def result(kind: str, value: float, dataset: str = "roneneldan/TinyStories") -> dict:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"type": dataset, "name": dataset.split("/")[-1]},
        "metrics": [{"type": kind, "value": value}],
    }


def test_results_of_the_same_metric_are_replaced_and_others_stay():
    theirs = {
        "model-index": [
            {
                "name": "mine",
                "results": [result("loss", 9), result("accuracy", 1), result("loss", 3, "a/b")],
            }
        ]
    }
    readme = f"---\n{yaml.safe_dump(theirs)}---\ntext"
    ours = {"tags": ["x"], "model-index": [{"name": "new", "results": [result("loss", 2)]}]}
    (model,) = metadata(join(readme, ours, where="README.md") + "\n")["model-index"]
    found = {
        (r["dataset"]["type"], m["type"]): m["value"]
        for r in model["results"]
        for m in r["metrics"]
    }
    tiny = "roneneldan/TinyStories"
    assert model["name"] == "mine"
    assert found == {(tiny, "loss"): 2, (tiny, "accuracy"): 1, ("a/b", "loss"): 3}


def test_a_card_of_ours_knows_an_edit():
    card = assemble(OURS, "\n# A\n\ntext\n")
    assert is_ours(card)
    assert not is_ours(card.replace("text", "texts"))
    assert not is_ours("# A\n")
    assert is_ours(card.replace("license: cdla-sharing-1.0", "license: mit"))
    told = renew(card.replace("- maxtext", "- maxtext\n- stories"), {"tags": ["moe"]}, "x")
    assert told["tags"] == ["moe", "stories"]
    assert hashlib.sha256(b"# A\n\ntext").hexdigest() in card
