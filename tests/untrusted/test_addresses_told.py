"""An address that is told of or published names neither user nor password nor signature."""

import click
import pytest

from moeconv.artifact.destination import resolve_out
from moeconv.cli.options import LocalPath
from moeconv.errors import MoeconvError
from moeconv.hub.public import shorten, tail
from moeconv.orbax.store import Folder
from moeconv.untrusted.files import without_access

ADDRESS = "http://zoe:s3cret@host:80/run/checkpoints/3/items?sig=s3cret#s3cret"


@pytest.mark.parametrize(
    "tell",
    [
        lambda: str(Folder.open(ADDRESS)),
        lambda: str(Folder.open("ftp" + ADDRESS[4:])),
        lambda: str(resolve_out(ADDRESS)),
        lambda: LocalPath().convert(ADDRESS, None, None),
        lambda: without_access(ADDRESS),
        lambda: without_access("http:/zoe:s3cret@b@host/a"),
        lambda: tail("http://zoe:s3cret@host"),
        lambda: tail(ADDRESS),
        lambda: shorten(f"read {ADDRESS}; http://zoe:s3cret@host", []),
    ],
)
def test_no_address_is_told_with_what_opens_it(tell):
    try:
        told = tell()
    except (MoeconvError, click.UsageError) as error:
        told = str(error)
    assert told
    assert "s3cret" not in told and "zoe" not in told


def test_the_store_is_still_asked_with_it():
    assert Folder.open(ADDRESS).url == ADDRESS
    assert without_access("/data/a?b@c#d") == "/data/a?b@c#d"
    assert without_access("gs://bucket/run") == "gs://bucket/run"
