"""Texts and names of branches that the shell hands over are looked at before anything is done."""

import click
import pytest

from moeconv.cli.data import prepare
from moeconv.cli.options import Revision, Text
from moeconv.cli.push import command as push

BAD = [
    "a\udcffb",
    "../x",
    "-x",
    "/x",
    "x/",
    "a..b",
    "a b",
    "a~b",
    "a^b",
    "a:b",
    "a?b",
    "a*b",
    "a[b",
    "a\\b",
    "a\x1b[1m",
    "a\x9b",
    "x.lock",
    "x.lock/y",
    ".x",
    "a/.x",
    "a//b",
    "a@{b",
    "@",
    "",
    "x.",
]


@pytest.mark.parametrize("name", BAD)
def test_what_git_takes_for_no_branch_is_refused(name):
    with pytest.raises(click.UsageError) as caught:
        Revision().convert(name, None, None)
    assert caught.value.exit_code == 2 and "\x1b" not in caught.value.message


@pytest.mark.parametrize("name", ["main", "v1.0", "refs/pr/3", "a@b", "ümlaut", "0a1b" * 10])
def test_what_git_takes_is_taken(name):
    assert Revision().convert(name, None, None) == name


def test_the_commands_ask_for_them():
    for command, name, kind in (
        (push, "message", Text),
        (push, "revision", Revision),
        (prepare, "column", Text),
        (prepare, "separator", Text),
        (prepare, "revision", Revision),
    ):
        (option,) = [one for one in command.params if one.name == name]
        assert type(option.type) is kind
        with pytest.raises(click.UsageError):
            option.type.convert("\udcff", option, None)
