"""`moeconv.list_families`: which decoder blocks of MaxText convert, and to what."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moeconv.families._table import Families


def list_families() -> "Families":
    """Lists the decoder blocks that convert, with their targets, and those that are refused.

    Returns:
        The table, made of the registered pages, also those of installed packages. `print` shows it
        as `moeconv families` does, `as_dict()` is the same as data.

    Raises:
        ConfigError: An installed page cannot be used.
    """
    from moeconv.families import _table

    return _table.families()
