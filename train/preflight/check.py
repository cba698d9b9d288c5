"""All checks of a run, in one call: config traps, data, GPUs, disk, memory of its steps."""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moeconv_train import run_dir
from moeconv_train.data.source import names_a_file
from moeconv_train.logs import wandb
from moeconv_train.preflight import memory as compiled
from moeconv_train.preflight.config import name_of
from moeconv_train.preflight.report import Finding, MemoryRow, Preflight
from moeconv_train.preflight.target import Target, memory_fraction
from moeconv_train.preflight.traps import TRAPS, find
from moeconv_train.settings import EMBEDDED

from moeconv.errors import HubError, MissingPackageError, MoeconvError, OutputError, to_install
from moeconv.sizes import format_size

if TYPE_CHECKING:
    from moeconv_train.plan import Plan


def preflight(
    plan: "Plan",
    *,
    memory: bool = True,
    online: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> Preflight:
    """Checks a run before it starts.

    Args:
        plan: The run.
        memory: Whether to compile its steps, about a minute for each configuration.
        online: Whether to ask the Hub.
        progress: Told what takes time.

    Returns:
        The findings, and the plan with what was mended; nothing is raised for a refused run.

    Raises:
        ConfigError: MaxText is not installed, or the environment contradicts itself.
    """
    none = [Finding("config", "ok", f"None of {len(TRAPS)} known traps.")]
    findings = find(plan) or none
    rows: list[MemoryRow] = []
    refused = any(finding.status == "refused" for finding in findings)
    if plan.config["enable_wandb"] and (trouble := wandb.missing()):
        findings.append(Finding("wandb", "mended", trouble, {"enable_wandb": False}))
    mended = {key: value for each in findings for key, value in each.mended.items()}
    plan = replace(plan, mended={**plan.mended, **mended})
    findings += check_reach(plan, online=online)
    on_gpu = plan.config["hardware"] != "cpu"
    if on_gpu:
        memory_fraction(plan.patches)  # says what is wrong with it
        findings += check_gpus(plan.target, str(plan.config["dtype"]))
    if memory and (refused or not on_gpu):
        why = "put right first what is refused" if refused else "this run is on the CPU"
        findings.append(Finding("memory", "skipped", f"Not compiled: {why}."))
    elif memory:
        finding, rows = _memory(plan, progress)
        findings.append(finding)
    return Preflight(plan, [*findings, check_disk(plan)], rows)


def check_reach(plan: "Plan", *, online: bool) -> Iterator[Finding]:
    """Dataset and tokenizer, which the Hub is asked for and nothing is downloaded; the two keys."""
    from huggingface_hub import get_token

    feed, config = plan.feed, plan.config
    data, dataset, tokenizer = feed.settings, None, str(config["tokenizer_path"] or "")
    if feed.dataset is None and feed.kind != "maxtext":
        dataset = feed.named or data.source
        tokenizer = tokenizer if data.tokenizer in ("llama3", EMBEDDED) else data.tokenizer
    if config["hf_train_files"] and feed.kind == "hf" and "://" not in config["hf_train_files"]:
        files = str(config["hf_train_files"])
        dataset = next(iter(glob(files)), files)  # noqa: PTH207 (may be absolute)
    if dataset and dataset != EMBEDDED:
        yield _source("dataset", dataset, online)
    if tokenizer:
        yield _source("model", tokenizer, online)
    # Without them, or with wrong ones, a run is still a run.
    if plan.run.hub_repo and not get_token():
        message = f"HF_TOKEN is not set: moeconv push to {plan.run.hub_repo} will need it."
        yield Finding("hub", "warn", message)
    if config["enable_wandb"] and not os.environ.get("WANDB_API_KEY"):
        message = "WANDB_API_KEY is not set: without `wandb login` W&B logs offline."
        yield Finding("wandb", "note", message)


def _source(kind: Literal["dataset", "model"], name: str, online: bool) -> Finding:
    """A local path, or a repository of the Hub that must be readable."""
    check = "tokenizer" if kind == "model" else kind
    if Path(name).expanduser().exists():
        return Finding(check, "ok", f"{name} is a local path.")
    parts, file = name.split("/"), kind == "dataset" and names_a_file(name)
    if file or name.startswith((".", "/", "~")) or len(parts) > 2 or "" in parts:
        message = f"{name}: there is no such file; give an existing path, or a Hub id owner/name."
        return Finding(check, "refused", message)
    if not online:
        return Finding(check, "skipped", f"{name} was not asked for: no network checks.")
    from huggingface_hub import HfApi

    from moeconv.hf.hub_address import read_address
    from moeconv.hf.hub_client import hub_client
    from moeconv.hf.hub_trouble import hub_trouble

    try:
        address = read_address(None)
        with hub_client(address):
            HfApi(endpoint=address.url).auth_check(name, repo_type=kind)
    except MoeconvError as error:
        why = str(error)
    except Exception as error:  # its transport's own errors have no stable name to catch
        why = hub_trouble(error, name, kind, "file or folder")
        why = why.replace("check the network", "check the network (on Kaggle: Settings, Internet)")
    else:
        return Finding(check, "ok", f"{name} on the Hub can be read.")
    return Finding(check, "refused", f"{name}: {why}.", error=HubError)


def check_gpus(target: Target, dtype: str) -> Iterator[Finding]:
    """What there is, against what the run is for, and whether JAX would use it."""
    capability = target.compute_capability
    if target.config_file is not None:
        message = f"No NVIDIA GPU here (nvidia-smi finds none); checked for {target.name}."
        yield Finding("gpu", "note", message)
        return
    if capability is None or capability < (7, 0):
        slow = "no tensor cores that nvidia-smi knows of, so FP16 gains little; choose T4 x2"
        yield Finding("gpu", "warn", f"{target.name}: {slow}.")
    elif target.has_bf16 and dtype == "float16":
        better = "has bfloat16, which needs no loss scaling: dtype=bfloat16"
        yield Finding("gpu", "note", f"{target.name}: {better}.")
    else:
        yield Finding("gpu", "ok", f"{target.name}.")
    if not compiled.plugin_installed():
        why = "JAX's CUDA plugin is not installed, so it would compute on the CPU"
        message = f"{why}; {to_install('train', 'cuda12')}."
        yield Finding("cuda", "refused", message, error=MissingPackageError)


def check_disk(plan: "Plan") -> Finding:
    """Compares the free space with the checkpoints that are still to come.

    A checkpoint is deleted only after the next one is whole, so one more than are kept must fit.
    Those that a resumed run has already need no new space; compression makes one at most smaller.
    """
    if not plan.config["enable_checkpointing"]:
        return Finding("disk", "note", "The run saves no checkpoints.")
    if plan.size is None:
        message = f"The size of a decoder_block={plan.config['decoder_block']} is not known."
        return Finding("disk", "skipped", message)
    each, keep = plan.size.state_bytes, int(plan.config["max_num_checkpoints_to_keep"])
    there = sum(step.name.isdigit() for step in plan.run_dir.glob("checkpoints/*"))
    needed = each * max(keep + 1 - there, 1)
    place = plan.run_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    message = (
        f"{plan.config['base_output_directory']} has {format_size(free)} free; {keep} checkpoints "
        f"of {format_size(each)} and one being saved"
        f"{f', {there} there already,' if there else ''} need {format_size(needed)}"
    )
    if plan.feed.kind == "prepared" and plan.feed.dataset is None:
        message += " (and data that are still to be prepared some, which are not counted)"
    if needed <= free:
        return Finding("disk", "ok", f"{message}.")
    message += ": free space there, or choose another base_output_directory."
    return Finding("disk", "refused", message, error=OutputError)


def _memory(plan: "Plan", progress: Callable[[str], None]) -> tuple[Finding, list[MemoryRow]]:
    """The compiled run, and the settings that would need less if it does not fit."""
    rungs = compiled.ladder(plan.config)
    if run_dir.saved_step(plan.run_dir) is not None:
        rungs = [rung for rung in rungs if all(map(run_dir.may_change, rung))]
    variants = [
        compiled.Variant(name_of(rung) or "as given", rung, plan.patches) for rung in ({}, *rungs)
    ]
    try:
        compiled.plugin_environment()  # or there is nothing to announce
        what = "train and evaluation step" if plan.config["eval_interval"] > 0 else "train step"
        progress(
            f"compiling the {what} for {plan.target.name}, about a minute, and as long for each "
            f"of {len(rungs)} other settings until one fits"
        )
        rows, _ = compiled.measure(plan.config, plan.target, variants, until_fit=True)
    except MissingPackageError as error:
        return Finding("memory", "warn", f"Memory was not checked: {error}."), []
    except MoeconvError as error:
        return Finding("memory", "refused", f"{error}.", error=type(error)), []
    return _verdict(rows, len(rungs)), rows


def _verdict(rows: list[MemoryRow], rungs: int) -> Finding:
    first, last = rows[0], rows[-1]
    state, train, evaluation, needs, usable = (
        f"{size / 2**30:.2f}"
        for size in (first.arguments, first.train, first.evaluation, first.total, first.usable)
    )
    sentence = (
        f"The run needs {needs} GiB of the {usable} GiB that JAX takes of each GPU: the state "
        f"{state}, beside it the train step {train} or an evaluation {evaluation}"
    )
    if first.fits and first.xla_rematerialised:
        message = f"{sentence}; XLA recomputes values to get there, which costs time."
        return Finding("memory", "warn", message)
    if first.fits:
        return Finding("memory", "ok", f"{sentence}.")
    if last.fits:
        fix = f"{last.name} would need {last.total / 2**30:.2f} GiB and trains the same model"
    else:
        fix = f"none of {rungs} settings that save memory is enough; shorten max_target_length"
    return Finding("memory", "refused", f"{sentence}; {fix}.")
