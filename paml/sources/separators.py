"""Cells that hold several classes: which separator joins them, and the classes of each cell."""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.parsing import parse_json
from paml.sources.table_columns import trim

NONE, JSON, BLANK = "none", "json", "blank"
"""Separators with a name: each cell is one class; lists in brackets; any blanks."""
SURE = ("|", ";", JSON)
"""Separators that names of classes do not contain."""
_MARKS = ("|", ";")
_SAMPLE = 20_000
_COMMA_SHARE = 0.5
_BLANK_SHARE = 0.8
_QUOTED = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_QUOTED_LIST = re.compile(rf"\[\s*(?:{_QUOTED}(?:\s*,\s*{_QUOTED}|\s+{_QUOTED})*\s*,?\s*)?\]", re.DOTALL)


def detect_separator(cells: Sequence[str]) -> str | None:
    """The separator that explains the distinct `cells` of a column; None if several or none do.

    `|` and `;` explain cells that have them, because classes rarely do. A comma explains cells if half of their pieces
    recur in other cells. Blanks explain cells if nearly all pieces recur and the cells far outnumber them, as
    combinations of tags do and names of classes (`traffic light`) do not.
    """
    cells = [cell for cell in cells if cell]
    lists = [cell for cell in cells if _is_bracketed(cell)]
    if lists and (len(lists) == len(cells) or any('"' in cell or "'" in cell for cell in lists)):
        return JSON if any(parse_list(cell) is not None for cell in lists[:_SAMPLE]) else None
    has = {mark: any(mark in cell for cell in cells) for mark in (*_MARKS, ",")}
    found = [mark for mark in _MARKS if has[mark]]
    if has[","] and _recurring_share(cells, lambda cell: _pieces(cell, ","))[0] >= _COMMA_SHARE:
        found.append(",")
    if found:
        return found[0] if len(found) == 1 else None
    if has[","]:
        return None
    if not any(re.search(r"\s", cell) for cell in cells):
        return NONE
    share, pieces = _recurring_share(cells, str.split)
    return BLANK if share >= _BLANK_SHARE and min(len(cells), _SAMPLE) >= 2 * pieces else None


def split_cells(cells: pa.Array, separator: str) -> tuple[np.ndarray, pa.Array, np.ndarray]:
    """(offsets int64[C + 1], classes string, bool[C] whether a cell was not understood) of C cells.

    The classes of cell c are `classes[offsets[c]:offsets[c + 1]]`; empty ones are left out.
    """
    bad = np.zeros(len(cells), bool)
    if separator == JSON:
        lists = [parse_list(cell) if _is_bracketed(cell) else [cell] for cell in cells.to_pylist()]
        bad = np.array([items is None for items in lists], bool)
        split = pa.array([items or [] for items in lists], pa.list_(pa.string()))
    elif separator == NONE:
        split = pa.ListArray.from_arrays(pa.array(np.arange(len(cells) + 1), pa.int32()), cells)
    elif separator.strip() and separator != BLANK:
        split = pc.call_function("split_pattern", [cells], pc.SplitPatternOptions(separator))
    else:
        split = pc.call_function("utf8_split_whitespace", [cells], pc.SplitOptions())
    classes = trim(split.flatten())
    cell_of = pc.call_function("list_parent_indices", [split]).to_numpy(zero_copy_only=False)
    is_class = pc.call_function("not_equal", [classes, pa.scalar("")]).to_numpy(zero_copy_only=False)
    counts = np.bincount(cell_of[is_class], minlength=len(cells))
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]), classes.filter(pa.array(is_class)), bad


def parse_list(text: str) -> list[str] | None:
    """The texts of a list as JSON, Python, numpy or Label Studio write it; None for anything else."""
    try:
        value = parse_json(text)
    except ValueError:
        return _parse_python_list(text)
    if isinstance(value, dict):
        value = value.get("choices")
    if not isinstance(value, list) or any(isinstance(item, list | dict | bool) for item in value):
        return None
    return [str(item) for item in value if item is not None]


def _parse_python_list(text: str) -> list[str] | None:
    if _QUOTED_LIST.fullmatch(text):
        return [re.sub(r"\\(.)", r"\1", item[1:-1], flags=re.DOTALL) for item in re.findall(_QUOTED, text, re.DOTALL)]
    if text.startswith("[") and text.endswith("]") and not re.search(r"""["'\[\]{}]""", text[1:-1]):
        return text[1:-1].split(",")
    return None


def _is_bracketed(cell: str) -> bool:
    return (cell.startswith("[") and cell.endswith("]")) or (cell.startswith('{"choices"') and cell.endswith("}"))


def _pieces(cell: str, separator: str) -> list[str]:
    return [piece.strip() for piece in cell.split(separator) if piece.strip()]


def _recurring_share(cells: Sequence[str], split: Callable[[str], list[str]]) -> tuple[float, int]:
    """(share of the joined cells' pieces that other cells have too, number of distinct pieces)."""
    parts = [set(split(cell)) for cell in cells[:_SAMPLE]]
    counts = Counter(piece for pieces in parts for piece in pieces)
    joined = {piece for pieces in parts if len(pieces) > 1 for piece in pieces}
    recurring = sum(counts[piece] > 1 for piece in joined)
    return recurring / len(joined) if joined else 0.0, len(counts)
