"""`moeconv inspect`: the model as moeconv understands it, and the settings still missing."""

from typing import Any

import click

from moeconv.cli.options import ACCEPT, CKPT, CONFIG, JSON, SET, output_of, tell_of_store


@click.command("inspect")
@CKPT
@CONFIG
@SET
@ACCEPT
@JSON
def command(ckpt: str, json_mode: bool, **options: Any) -> None:
    """Show a MaxText checkpoint or a Hugging Face model as moeconv understands it.

    SRC is a run directory, its checkpoints/, a step, a step's items/, or a gs://, s3:// or http://
    address of one; the newest complete step is taken unless one is named. Or it is a folder with
    config.json and safetensors, or hf://namespace/name[@revision].
    """
    from moeconv.api.checkpoint import open_checkpoint

    output = output_of(json_mode)
    tell_of_store(output, ckpt)
    checkpoint = open_checkpoint(ckpt, **options)
    output.answer(checkpoint)
    for text in () if json_mode else checkpoint.warnings:
        output.warn(text)
