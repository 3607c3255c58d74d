"""CSV reports that are safe to open in a spreadsheet, which runs a cell that begins with = + - @ as a formula. Some
spreadsheets do so for the full-width forms of these characters too.

Text that begins with one of these characters (or a tab, a line end or an apostrophe) gets a leading apostrophe in every
CSV written for people: audit results, rejects, tables of trials and comparisons, predicted classes. `unescape_formula`
removes it. Formats for programs are exact: Open Images annotations and class lists, priors, label files.
"""

import csv
import io
from collections.abc import Iterable
from typing import Any, TextIO

FORMULA_PREFIXES = "=+-@＝＋－＠\t\r\n'"
"""Text that begins with one of these gets a leading apostrophe."""


def escape_formula(field: str) -> str:
    """The text as it is written to a report."""
    return "'" + field if field[:1] and field[0] in FORMULA_PREFIXES else field


def unescape_formula(field: str) -> str:
    """The inverse of `escape_formula`."""
    return field[1:] if field[:1] == "'" and field[1:2] and field[1] in FORMULA_PREFIXES else field


def write_report(text: TextIO, rows: Iterable[Iterable[Any]]) -> None:
    """Write the rows as CSV for people: escapes texts, but not numbers.

    A row with a carriage return, at which spreadsheets start a new row, is quoted.
    """
    plain = csv.writer(text, lineterminator="\n")
    quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        cells = [escape_formula(value) if isinstance(value, str) else value for value in row]
        has_return = any(isinstance(cell, str) and "\r" in cell for cell in cells)
        (quoted if has_return else plain).writerow(cells)


def format_csv(rows: Iterable[Iterable[Any]]) -> str:
    """The rows as `write_report` writes them."""
    text = io.StringIO()
    write_report(text, rows)
    return text.getvalue()
