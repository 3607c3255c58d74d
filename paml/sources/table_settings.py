"""Settings of the source `table`, and what the words in its cells mean. Other sources read their cells by them, too."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from paml.errors import SettingsError, check_setting
from paml.labels.states import NEGATIVE, POSITIVE, UNOBSERVED
from paml.sources.records import TEXT_OF_STATE

FORMS = ("auto", "long", "list", "wide")
_STATES = {"positive": POSITIVE, "negative": NEGATIVE, "unobserved": UNOBSERVED}
_WORDS = {
    **dict.fromkeys(("1", "yes", "y", "true", "t", "present", "positive", "pos"), TEXT_OF_STATE[POSITIVE]),
    **dict.fromkeys(("0", "no", "n", "false", "f", "absent", "negative", "neg"), TEXT_OF_STATE[NEGATIVE]),
    **dict.fromkeys(("unknown", "uncertain", "unobserved"), TEXT_OF_STATE[UNOBSERVED]),
}
_BLANK_WORDS = ("", "nan", "null", "none", "na", "n/a", "<na>")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class TableSettings:
    """How to read a table of labels: which columns it has and what their values mean."""

    form: str = "auto"
    """`long`: a row per label (image, class[, state]). `list`: a row per image, with its classes in one cell. `wide`: a
    row per image and a column per class. `auto`: by the columns."""
    image_column: str | None = None
    """The column of images; null: by the usual names (image, file_name, path, image_id, ...)."""
    class_column: str | None = None
    """long: the column of classes; null: by the usual names (class, label, category, ...)."""
    state_column: str | None = None
    """long: the column of states; null: by the usual names (state, confidence, value, ...). Without one, each row is
    a positive label."""
    labels_column: str | None = None
    """list: the column of the classes of an image; null: by the usual names (labels, tags, classes, ...)."""
    class_columns: list[str] | None = None
    """wide: the columns that are classes; null: those that hold only states."""
    split_column: str | None = None
    """The column of splits; null: by the usual names (split, subset, set, ...)."""
    separator: str | None = None
    """What joins the classes of a cell, such as `|`; or `blank`, `json` (lists in brackets), or `none` (each cell is
    one class); null: detected if it is unambiguous."""
    minus_one: str | None = None
    """What -1 means: `negative`, `unobserved` or `positive`; null: -1 is rejected."""
    positive_words: tuple[str, ...] = ()
    """More words for positive. Built in: 1, yes, y, true, t, present, positive, pos."""
    negative_words: tuple[str, ...] = ()
    """More words for negative. Built in: 0, no, n, false, f, absent, negative, neg."""
    unobserved_words: tuple[str, ...] = ()
    """More words for unobserved. Built in: a blank cell, nan, null, none, n/a, unknown, uncertain, unobserved."""

    def __post_init__(self) -> None:
        check_setting(self.form in FORMS, "table.form", self.form, f"one of {', '.join(FORMS)}")
        check_setting(self.separator != "", "table.separator", self.separator, "a text, blank, json, none or null")
        allowed = (None, *_STATES)
        check_setting(self.minus_one in allowed, "table.minus_one", self.minus_one, f"null, {', '.join(_STATES)}")
        given = {form: name for form, name in self._form_settings() if getattr(self, name) is not None}
        if self.form != "auto":
            given.setdefault(self.form, "form")
        if len(given) > 1:
            names = " and ".join(f"table.{name}" for name in given.values())
            raise SettingsError(f"{names} are of different forms, {' and '.join(given)}: set only those of one form")
        words = [word.strip().lower() for word in (*self.positive_words, *self.negative_words, *self.unobserved_words)]
        repeated = [word for word in words if words.count(word) > 1]
        check_setting(not repeated, "table.positive_words and the like", (repeated or [""])[0], "in one of them, once")

    @staticmethod
    def _form_settings() -> Sequence[tuple[str, str]]:
        return ("long", "class_column"), ("long", "state_column"), ("list", "labels_column"), ("wide", "class_columns")

    @property
    def given_form(self) -> str:
        """The form that `form` or the settings of one form say; `auto` if none does."""
        given = [form for form, name in self._form_settings() if getattr(self, name) is not None]
        return given[0] if given else self.form

    def state_of(self, text: str) -> str | None:
        """`1`, `0` or "" (unobserved) as in `Records.state`; None for a blank cell, and other texts unchanged."""
        word = text.lower()
        own = (self.positive_words, self.negative_words, self.unobserved_words)
        for state, words in zip(_STATES.values(), own, strict=True):
            if any(word == own_word.strip().lower() for own_word in words):
                return TEXT_OF_STATE[state]
        if word in _BLANK_WORDS:
            return None
        number = number_of(word)
        if number == -1 and self.minus_one is not None:
            return TEXT_OF_STATE[_STATES[self.minus_one]]
        if number in (0, 1):
            word = str(int(number))
        return _WORDS.get(word, text)


def number_of(text: str) -> float | None:
    """The number that a text is; None for others."""
    return float(text) if _NUMBER.fullmatch(text) else None
