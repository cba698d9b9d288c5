"""`moeconv families`: which decoder blocks of MaxText convert, and to what."""

import click

from moeconv.cli.options import JSON, output_of


@click.command("families")
@JSON
def command(json_mode: bool) -> None:
    """List the decoder blocks of MaxText that convert, and those that are refused, with why."""
    from moeconv.api.families import list_families

    output_of(json_mode).answer(list_families())
