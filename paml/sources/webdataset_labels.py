"""What the members of WebDataset's samples say about labels: texts, class numbers and JSON, and what they share."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from paml import storage
from paml.errors import DataError
from paml.labels.class_list import ClassList
from paml.parsing import parse_errors_as, parse_json
from paml.sources.separators import NONE, detect_separator, split_cells

FIELDS = ("labels", "classes", "tags", "categories", "label", "class")
_STATE_LISTS = {"positive": "1", "negative": "0", "unobserved": ""}
_CLASS_FILES = ("classes.txt", "classnames.txt", "classes.json", "classnames.json")
_NUMBERS = re.compile(r"\[?\s*[+-]?[0-9]{1,18}(?:[\s,]+[+-]?[0-9]{1,18})*\s*,?\s*\]?")

Pairs = tuple[tuple[str, str], ...]
"""(class, state) of each label, as in `Records`."""


class _Lines(Pairs):
    """Labels of a text with one class per line."""


Labels = Pairs | list[int] | str | None
"""What a member holds: labels, numbers, a text of one or several classes, or nothing."""


@dataclass
class LabelParser:
    """Reads members one at a time and counts what the user should see."""

    json_field: str | None
    """None: the first of FIELDS."""
    state_of: Callable[[str], str | None]
    """The state of a text as in `Records`; None for a blank one."""
    fields: Counter[str] = field(default_factory=Counter)
    """JSON members by the field whose labels were read."""
    unread_fields: Counter[str] = field(default_factory=Counter)
    """Fields that may be labels, too."""
    without_labels: Counter[str] = field(default_factory=Counter)
    """The fields of JSON members that have no labels."""

    def parse(self, data: bytes, *, is_json: bool) -> Labels:
        """The labels of a member. Raises ValueError or OverflowError."""
        return self._parse_json(data) if is_json else self._parse_text(data.decode("utf-8-sig"))

    def _parse_text(self, text: str) -> Labels:
        if _NUMBERS.fullmatch(text.strip()):
            return [int(number) for number in re.findall(r"[+-]?[0-9]+", text)]
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if len(lines) > 1:
            return _Lines(_positive(lines))
        return _class_text(lines[0]) if lines else None

    def _parse_json(self, data: bytes) -> Labels:
        value = parse_json(data)
        if not isinstance(value, dict):
            if self.json_field is not None:
                raise ValueError(f"it has no field {self.json_field!r}, because it is not an object")
            return self._parse_value(value)
        known = [name for name in (FIELDS if self.json_field is None else (self.json_field,)) if name in value]
        if known:
            self.fields[known[0]] += 1
            self.unread_fields.update(known[1:])
            return self._parse_value(value[known[0]])
        if self.json_field is None:
            lists = {name: value[name] for name in _STATE_LISTS if isinstance(value.get(name), list)}
            if lists or (value and all(_is_state(state) for state in value.values())):
                self.fields[" and ".join(lists) or "one per class"] += 1
                return self._parse_map(lists or value)
        self.without_labels.update(list(value))
        return None

    def _parse_value(self, value: Any) -> Labels:
        if value is None:
            return None
        if isinstance(value, str):
            return self._parse_text(value)
        if isinstance(value, dict):
            return self._parse_map(value)
        if not isinstance(value, list):
            return [_number(value)]
        if value and all(isinstance(item, bool) for item in value):
            return [int(item) for item in value]  # a state per class
        if value and not any(isinstance(item, str) for item in value):
            return [_number(item) for item in value]
        return _positive(value)

    def _parse_map(self, value: Mapping[str, Any]) -> Pairs:
        """Lists of classes by their state, or the state of each class."""
        if value and set(value) <= set(_STATE_LISTS) and all(isinstance(items, list) for items in value.values()):
            return tuple((_class_text(item), _STATE_LISTS[name]) for name, items in value.items() for item in items)
        return tuple((_class_text(cls), self._parse_state(state)) for cls, state in value.items())

    def _parse_state(self, value: Any) -> str:
        if isinstance(value, list | dict):
            raise ValueError(f"{value!r:.80} is not a state (1, 0, -1 or null)")
        text = "" if value is None else str(value).strip()
        text.encode()  # JSON can have text that is not valid Unicode
        return self.state_of(text) or ""


def _is_state(value: Any) -> bool:
    return value is None or (isinstance(value, bool | int | float) and value in (-1, 0, 1))


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r:.80} is not a class number")
    return int(value)


def _class_text(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else str(_number(value))
    text.encode()
    if not text:
        raise ValueError("a class has no name")
    return text


def _positive(classes: Iterable[Any]) -> Pairs:
    return tuple((cls, "1") for cls in map(_class_text, classes))


def comparable(labels: Labels, names: Sequence[str]) -> set[tuple[str, str]]:
    """Labels of different members in one form. names: of the classes by number."""
    if isinstance(labels, list):
        return {(names[n] if 0 <= n < len(names) else str(n), "1") for n in labels}
    return {(labels, "1")} if isinstance(labels, str) else set(labels or ())


class LabelResolver:
    """From what members hold to labels, by what all of them have in common."""

    def __init__(
        self, path: str, values: Sequence[Labels], parser: LabelParser, separator: str | None, names: Sequence[str]
    ) -> None:
        """values: those of all samples; names: of the classes by number, or none.

        Raises DataError if the separator of texts is not certain.
        """
        self._state_of = parser.state_of
        self._names = names if len(set(names)) == len(names) else ()
        self.classes = ClassList(path, list(self._names) or [str(n) for n in range(len(names))], list(names))
        """The known classes; none without names. Those with equal names are numbers."""
        self.are_states = _are_states([value for value in values if isinstance(value, list)])
        """Whether lists of numbers are a state per class."""
        self.below_zero = 0
        """Class numbers below 0, which mean no class."""
        if separator is None and any(isinstance(value, _Lines) for value in values):
            separator = NONE
        self._classes_of = _split_texts(path, {value for value in values if isinstance(value, str)}, separator)

    def pairs(self, labels: Labels) -> Iterator[tuple[str, str]]:
        """(class, state) of a member's labels."""
        if isinstance(labels, list) and self.are_states:
            yield from ((self._named(str(n)), self._state_of(str(state)) or "") for n, state in enumerate(labels))
        elif isinstance(labels, list):
            self.below_zero += sum(n < 0 for n in labels)
            yield from ((self._named(str(n)), "1") for n in labels if n >= 0)
        elif isinstance(labels, str):
            yield from ((self._named(cls), "1") for cls in self._classes_of[labels])
        else:
            yield from ((self._named(cls), state) for cls, state in labels or ())

    def _named(self, cls: str) -> str:
        """The name of a class number, if it is known; other classes unchanged."""
        if not self._names or not is_number(cls) or cls in self._names or int(cls) >= len(self._names):
            return cls
        return self._names[int(cls)]


def is_number(cls: str) -> bool:
    """Whether a class is a number in decimal digits."""
    return cls.isascii() and cls.isdecimal() and len(cls) < 19


def _are_states(lists: Sequence[Sequence[int]]) -> bool:
    """Whether lists have one length and only -1, 0 and 1, with repetitions, as class numbers have not."""
    return (
        len({len(values) for values in lists}) == 1
        and all(-1 <= value <= 1 for values in lists for value in values)
        and any(len(set(values)) < len(values) for values in lists)
    )


def _split_texts(path: str, texts: Iterable[str], separator: str | None) -> dict[str, list[str]]:
    """The classes of each text. Raises DataError if the separator is not certain."""
    cells = sorted(texts)
    separator = separator or detect_separator(cells)
    if separator is None:
        examples = ", ".join(repr(text[:60]) for text in sorted(cells, key=len, reverse=True)[:3])
        raise DataError(
            f"{path!r} has texts that may be one class or several: {examples}. Set webdataset.separator to what joins "
            "them (such as ','), to blank, or to none if each is one class"
        )
    offsets, classes, bad = split_cells(pa.array(cells, pa.string()), separator)
    found = classes.to_pylist()
    return {cell: [cell] if bad[n] else found[offsets[n] : offsets[n + 1]] for n, cell in enumerate(cells)}


def read_class_names(root: str) -> tuple[list[str], str | None]:
    """(names by class number, their file), from a file in the folder of the tar files; ([], None) without one."""
    path = next((path for name in _CLASS_FILES if storage.exists(path := storage.join(root, name))), None)
    if path is None:
        return [], None
    with parse_errors_as(path, "write one class per line, or as JSON a list of names"):
        text = storage.read_bytes(path).decode("utf-8-sig")
        names: Any = parse_json(text) if path.endswith(".json") else text.rstrip().splitlines()
        if isinstance(names, dict):
            is_name_first = all(isinstance(number, int) for number in names.values())
            pairs = names.items() if is_name_first else [(name, int(number)) for number, name in names.items()]
            by_number = {number: name for name, number in pairs}
            names = [by_number[number] for number in range(len(names))]
        return [_class_text(name) for name in names], path
