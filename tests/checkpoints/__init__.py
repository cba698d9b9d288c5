"""The table of checkpoints that the tests write: a family is one row, in a module of its own here.

A row feeds what writes checkpoints without MaxText (tests/synthetic.py, and with it the hypothesis
strategies of tests/mapping/models.py), the matrix (tests/conversion/test_matrix.py), and in
tests/verification/levels all levels of verify (test_families.py) and the mistakes that they find
(test_family_mistakes.py). Modules and rows are found by themselves, as the pages of
moeconv/families are; row.py says what a row holds.
"""

import importlib
import pkgutil
from collections.abc import Mapping

from checkpoints.row import Row

_PAGES = [
    importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)
]
# In the order of their names, which is that of the tests.
ROWS: Mapping[str, Row] = {
    row.name: row for page in _PAGES for row in vars(page).values() if isinstance(row, Row)
}
