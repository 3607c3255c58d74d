"""The form of a table (long, list or wide), and which of its columns are images, classes, states and splits."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paml.errors import LabelError
from paml.sources.records import TEXT_OF_STATE
from paml.sources.separators import SURE, detect_separator
from paml.sources.table_columns import Column, ListColumn, TableFile, one_line
from paml.sources.table_settings import TableSettings, number_of

# As `column_word` gives them, in order of preference: a path tells more than a number.
IMAGE_NAMES = (
    "imagepath", "imgpath", "filepath", "path", "filename", "imagefile", "imagefilename", "imagename", "imgname",
    "file", "image", "img", "photo", "picture", "imageindex", "imageid", "imgid", "id", "name",
)  # fmt: skip
_CLASS_NAMES = (
    "classname", "labelname", "categoryname", "class", "label", "category", "tag", "target", "classid", "labelid",
    "categoryid",
)  # fmt: skip
_LABELS_NAMES = (
    "labels", "labelnames", "classes", "classnames", "categories", "categorynames", "tags", "findinglabels",
    "findings", "targets", "attributes", "choices", "choice",
)  # fmt: skip
_STATE_NAMES = ("state", "confidence", "value", "present", "presence", "ispresent")
_STATE_NAMES_NEXT_TO_CLASS = ("label", "target", "labels")
_SPLIT_NAMES = ("split", "datasplit", "subset", "partition", "set", "dataset", "phase")
_SPLIT_WORDS = ("train", "val", "test", "dev")
_MAX_WORDS = 1000
SHOWN = 8


def shown(names: Sequence[str]) -> str:
    """The first names of columns, for messages."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else "")


def column_word(name: str) -> str:
    """The name of a column without case, blanks, `_` and `-`."""
    return re.sub(r"[\s_-]", "", name.lower())


@dataclass(kw_only=True)
class TableForm:
    """The form of a table and the columns that are used."""

    form: str
    image: str
    split: str | None = None
    cls: str | None = None
    """long and list: the classes."""
    state: str | None = None
    """long"""
    classes: Sequence[str] = ()
    """wide"""
    plural: bool = False
    """Whether the name of `cls`, or a setting, says that a cell has several classes."""
    other_images: Sequence[str] = ()
    """Columns that could be the image, too."""
    notes: list[str] = field(default_factory=list)

    def described(self) -> list[str]:
        """The columns that are used, for `Records.understood`."""
        used = {"image": self.image, "class": self.cls, "state": self.state, "split": self.split}
        texts = [f"{role} column {name!r}" for role, name in used.items() if name is not None]
        if self.other_images:
            texts[0] += f" (not {', '.join(map(repr, self.other_images))})"
        if self.form == "wide":
            texts.append(f"class columns {shown(self.classes)}")
        return texts


def choose_form(path: str, table: TableFile, settings: TableSettings) -> TableForm:
    """The form and the columns, by the settings, the names and the values. Raises LabelError."""
    names = list(table.columns)

    def pick(setting: str | None, usual: Sequence[str], taken: Sequence[str | None] = ()) -> str | None:
        return _pick(path, [name for name in names if name not in taken], setting, usual)

    image = pick(settings.image_column, IMAGE_NAMES)
    if image is None:
        raise LabelError(
            f"{path!r} has no column of images among {shown(names)}: name one image, file_name or image_id in the "
            "first line, or set table.image_column"
        )
    split = pick(settings.split_column, _SPLIT_NAMES, [image])
    if (
        split
        and settings.split_column is None
        and column_word(split) != "split"
        and not _has_splits(table.columns[split])
    ):
        split = None
    taken = [image, split]
    others = [name for name in names if name not in taken and column_word(name) in IMAGE_NAMES]
    state_columns = [
        name
        for name in names
        if name not in (*taken, *others)
        and not column_word(name).startswith("unnamed:")
        and column_word(name) != "index"
        and _is_class(table.columns[name], settings)
    ]
    form = settings.given_form
    usual = {"long": _CLASS_NAMES + _LABELS_NAMES, "list": _LABELS_NAMES + _CLASS_NAMES}.get(
        form, _LABELS_NAMES + _CLASS_NAMES
    )
    cls = pick(settings.class_column or settings.labels_column, usual, taken)
    if form == "auto" and cls in state_columns:
        cls = pick(None, usual, [*taken, *state_columns]) or cls
    if cls is None and form in ("auto", "list"):
        lists = [name for name, column in table.columns.items() if isinstance(column, ListColumn)]
        cls = lists[0] if len(lists) == 1 else None
    columns = TableForm(form=form, image=image, split=split, other_images=others)
    if form == "auto":
        columns.form = _detect_form(path, table, cls, pick(None, _STATE_NAMES, taken), state_columns)
    if columns.form == "wide":
        columns.classes = state_columns
        if settings.class_columns is not None:
            columns.classes = [name for wanted in settings.class_columns if (name := pick(wanted, ()))]
        if not columns.classes:
            raise _no_classes(path, table, taken)
    else:
        if cls is None:
            raise _no_classes(path, table, taken)
        columns.cls = cls
        columns.plural = form == "list" or column_word(cls) in _LABELS_NAMES
        if columns.form == "long":
            columns.state = pick(settings.state_column, _STATE_NAMES, [*taken, cls]) or next(
                (name for name in state_columns if name != cls and column_word(name) in _STATE_NAMES_NEXT_TO_CLASS),
                None,
            )
    used = (image, split, columns.cls, columns.state, *columns.classes)
    lists = [name for name in used if isinstance(table.columns.get(name or ""), ListColumn) and name != columns.cls]
    if lists:
        raise LabelError(f"{path!r} has lists in {lists[0]!r}, only classes can be lists: correct the column settings")
    if unused := [_example(table, name) for name in names if name not in used] + table.left_out:
        columns.notes.append(f"columns that are not used: {shown(unused)}")
    return columns


def _pick(path: str, names: Sequence[str], setting: str | None, usual: Sequence[str]) -> str | None:
    """The column that the setting or else the first usual name means; None without. Raises LabelError."""
    if setting is not None:
        wanted = one_line(setting)
        fitting = [name for name in names if name == wanted] or [n for n in names if n.lower() == wanted.lower()]
        if len(fitting) != 1:
            raise LabelError(f"{path!r} has no column {setting!r}: it has {shown(names)}; correct the setting")
        return fitting[0]
    for known in usual:
        fitting = [name for name in names if column_word(name) == known]
        if len(fitting) > 1:
            raise LabelError(
                f"{path!r} has several columns with one meaning, {' and '.join(map(repr, fitting))}: choose with "
                "table.image_column, class_column, labels_column, state_column or split_column"
            )
        if fitting:
            return fitting[0]
    return None


def _detect_form(path: str, table: TableFile, cls: str | None, state: str | None, state_columns: Sequence[str]) -> str:
    """The form of a table by the names and values of its columns. Raises LabelError if two forms fit."""
    if cls is not None and state is not None and cls != state:
        return "long"
    wide = [name for name in state_columns if name != cls]
    if cls is None or cls in state_columns:
        if cls is not None and not wide:
            values = " and ".join(repr(text) for text in table.columns[cls].texts.to_pylist()[:2])
            raise LabelError(
                f"{path!r} has one column of classes, {cls!r}, with the values {values}: set table.form to wide if it "
                f"is a class {cls!r} that is present or absent, or to long if these are names of classes"
            )
        return "wide"
    by_name = [name for name in wide if column_word(name) in _STATE_NAMES_NEXT_TO_CLASS]
    if len(wide) > 1 and not by_name and not _is_joined(table.columns[cls]):
        raise LabelError(
            f"{path!r} has classes in the column {cls!r}, and {len(wide):,} columns of states, {shown(wide)}: set "
            "table.form to wide, list or long"
        )
    return "long" if by_name or column_word(cls) in _CLASS_NAMES else "list"


def _is_joined(column: Column | ListColumn) -> bool:
    """Whether the cells are lists beyond doubt."""
    return isinstance(column, ListColumn) or detect_separator(column.texts.to_pylist()) in SURE


def _no_classes(path: str, table: TableFile, taken: Sequence[str | None]) -> LabelError:
    columns = shown([_example(table, name) for name in table.columns if name not in taken] + table.left_out)
    return LabelError(
        f"{path!r} has no column of classes among {columns or 'none'}: set table.class_column (a row per label), "
        "table.labels_column (classes in one cell) or table.class_columns (1, 0 or blank per class; other words with "
        "table.positive_words); for numbers with names of classes, and embedded images, set source to hf"
    )


def _example(table: TableFile, name: str) -> str:
    """A column and the first cell that is not empty."""
    text = next((text for text in table.columns[name].texts[:SHOWN].to_pylist() if text), "")
    return f"{name} ({text[:30]!r})"


def _has_splits(column: Column | ListColumn) -> bool:
    return any(text.lower().startswith(_SPLIT_WORDS) for text in column.texts[:_MAX_WORDS].to_pylist())


def _is_class(column: Column | ListColumn, settings: TableSettings) -> bool:
    """Whether a column holds states: most cells, if no other is a number below -1 or above 1 (an age, a count).

    Letters count only in pairs, such as y and n: F and M are not states.
    """
    if isinstance(column, ListColumn) or len(column.texts) > _MAX_WORDS:
        return False
    texts = column.texts.to_pylist()
    states = [settings.state_of(text) for text in texts]
    known = [state in (None, *TEXT_OF_STATE.values()) or number_of(state) == -1 for state in states]
    written = [number for number, state in enumerate(states) if state is not None]
    counts = np.bincount(column.codes, minlength=len(texts))
    own = {
        word.strip().lower()
        for word in (*settings.positive_words, *settings.negative_words, *settings.unobserved_words)
    }
    letters = [n for n in written if re.fullmatch("[a-zA-Z]", texts[n]) and texts[n].lower() not in own]
    if all(known[number] for number in written):
        return any(states[n] != "" for n in written) and not (len(written) == len(letters) == 1)
    if any(abs(number_of(texts[n]) or 0) > 1 for n in written if not known[n]):
        return False
    certain = sum(int(counts[n]) for n in written if known[n] and n not in letters)
    return 2 * certain > sum(int(counts[n]) for n in written)
