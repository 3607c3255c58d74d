"""CSV that people open: a spreadsheet runs a cell that begins with one of = + - @ as a formula.

The rule: text that begins so (or with a tab, a line end or an apostrophe) gets an apostrophe in front in every CSV
that is a report for people: finds, rejects, tables of trials, comparisons and maps, classes of predictions. `restored`
takes it off again. Formats that programs exchange stay exact to the byte: annotations and class lists as Open Images
has them, priors, one's own labels.
"""

import csv
from collections.abc import Iterable
from typing import Any, TextIO

FORMULA_MARKS = "=+-@\t\r\n'"
"""Text that begins with one of these is written with an apostrophe in front."""


def defused(field: str) -> str:
    """The field as it is written, so that no spreadsheet runs it."""
    return "'" + field if field[:1] and field[0] in FORMULA_MARKS else field


def restored(field: str) -> str:
    """What `defused` was given."""
    return field[1:] if field[:1] == "'" and field[1:2] and field[1] in FORMULA_MARKS else field


class ReportWriter:
    """Writes rows as CSV for people: texts are defused, numbers stay, below 0 too."""

    def __init__(self, text: TextIO) -> None:
        self._plain = csv.writer(text, lineterminator="\n")
        self._quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)

    def writerow(self, row: Iterable[Any]) -> None:
        """One row. The csv module leaves a lone carriage return bare, and spreadsheets begin a new row there."""
        cells = [defused(value) if isinstance(value, str) else value for value in row]
        returns = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (self._quoted if returns else self._plain).writerow(cells)

    def writerows(self, rows: Iterable[Iterable[Any]]) -> None:
        """Several rows."""
        for row in rows:
            self.writerow(row)
