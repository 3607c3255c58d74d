"""What a training run rejected, to be looked at: pictures of the labels, by epoch, and the classes rejected most.

As a figure, and as one HTML file that asks no server and runs no script.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from paml.audit.page import source_digest, thumbnail
from paml.data.decode import decode_rgb
from paml.errors import PamlError
from paml.explain.figures import plain_axes, save
from paml.labels.states import NEGATIVE, POSITIVE
from paml.shards.reader import ShardReader
from paml.training.data import Split
from paml.training.rejected import Rejected, kept_rejected

EPOCHS_SHOWN = 4
IN_FIGURE, IN_PAGE = 8, 12
"""Labels shown of an epoch: the strongest, and in the page as many again drawn by lot."""
CLASSES_IN_FIGURE, CLASSES_IN_PAGE = 20, 40
SIDE = 192
"""Longest side of a picture in the page, pixels."""
PICTURE_BYTES = 24_000
"""At most, so that the page stays below 4 MB."""
_TRUE, _FALSE, _UNKNOWN, _SOFT, _DARK = "#1a7f37", "#c4320a", "#777777", "#9ecae1", "#08519c"


@dataclass(frozen=True)
class ShownLabel:
    """A rejected label and its picture."""

    pixels: np.ndarray
    """uint8 [H, W, 3]."""
    key: str
    mid: str
    name: str
    logit: float
    truth: bool | None
    """Whether it is positive; None where the truth is not known."""

    @property
    def loss(self) -> float:
        """What the label cost as a negative, -log(1 - p)."""
        return float(np.logaddexp(0.0, self.logit))

    @property
    def chance(self) -> float:
        """The score, in [0, 1]."""
        return 1.0 - math.exp(-self.loss)


@dataclass(frozen=True)
class ShownClass:
    """How many labels of a class an epoch rejected."""

    mid: str
    name: str
    rejected: int
    false_negatives: int | None
    """Of them truly positive; None where the truth is not known."""


@dataclass(frozen=True)
class ShownEpoch:
    """What an epoch rejected."""

    epoch: int
    rejected: int
    false_negatives: int | None
    strongest: list[ShownLabel]
    drawn: list[ShownLabel]
    """An even sample of all."""
    classes: list[ShownClass]
    """Those rejected most, the first of them most often."""


def shown_epochs(run_folder: str, split: Split, epochs: int, seed: int) -> list[ShownEpoch]:
    """What a run of so many epochs kept of some that rejected labels: evenly spread, the first and the last with them.

    split: the training images with their labels. Images that cannot be read are passed over.
    """
    kept = {epoch: one for epoch in range(1, epochs + 1) if (one := kept_rejected(run_folder, epoch, seed))}
    if not kept:
        return []
    places = np.linspace(0, len(kept) - 1, min(len(kept), EPOCHS_SHOWN)).round().astype(int)
    chosen = [list(kept)[place] for place in np.unique(places).tolist()]
    reader = ShardReader(split.manifest)
    return [_shown(epoch, kept[epoch], split, reader) for epoch in chosen]


def _shown(epoch: int, kept: Rejected, split: Split, reader: ShardReader) -> ShownEpoch:
    rejected, true = kept.by_class
    known = split.truth is not None
    most = [cls for cls in np.argsort(-rejected, kind="stable")[:CLASSES_IN_PAGE].tolist() if rejected[cls]]
    names, mids = split.table.names, split.table.classes
    classes = [ShownClass(mids[c], names[c], int(rejected[c]), int(true[c]) if known else None) for c in most]
    labels = [[_label(kept, place, split, reader) for place in order[:IN_PAGE].tolist()] for order in _orders(kept)]
    strongest, drawn = ([label for label in some if label is not None] for some in labels)
    return ShownEpoch(epoch, int(rejected.sum()), int(true.sum()) if known else None, strongest, drawn, classes)


def _orders(kept: Rejected) -> tuple[np.ndarray, np.ndarray]:
    return kept.strongest(), kept.drawn()


def _label(kept: Rejected, place: int, split: Split, reader: ShardReader) -> ShownLabel | None:
    image, cls = divmod(int(kept.codes[place]), split.table.num_classes)
    try:
        pixels = decode_rgb(reader.read(image))
    except (PamlError, OSError):
        return None
    key = split.manifest.key(image)
    return ShownLabel(
        pixels,
        key,
        split.table.classes[cls],
        split.table.names[cls],
        float(kept.logits[place]),
        _truth(split, image, cls),
    )


def _truth(split: Split, image: int, cls: int) -> bool | None:
    if split.truth is None or split.truth_rows is None:
        return None
    row = split.truth_rows[np.flatnonzero(split.samples.index == image)]
    if not len(row) or row[0] < 0:
        return None
    labels = split.truth.lookup(row)
    state = labels.state[labels.cls == cls]
    return {POSITIVE: True, NEGATIVE: False}.get(int(state[0])) if len(state) else None


def draw_gallery(epochs: Sequence[ShownEpoch], path: str) -> None:
    """Draw to `path` (PNG): a row of the strongest labels for each epoch; the classes that the last rejected most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Placed by hand, in inches from the top left: a layout engine takes seconds for as many axes.
    width, height = 16.6, 0.5 + 2.25 * max(2, len(epochs))

    def axes(left: float, top: float, wide: float, high: float) -> Any:
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    def text(left: float, top: float, said: str, **look: Any) -> None:
        figure.text(left / width, 1 - top / height, said, va="top", **look)

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    text(
        0.1,
        0.1,
        "Labels rejected most strongly (frame: green truly positive, red not, grey not known)",
        fontsize=11,
        fontweight="bold",
    )
    for row, shown in enumerate(epochs):
        text(0.1, 0.45 + 2.25 * row, f"epoch {shown.epoch}: {_said(shown)}", fontsize=10)
        for place, label in enumerate(shown.strongest[:IN_FIGURE]):
            _draw_label(axes(0.1 + 1.5 * place, 0.95 + 2.25 * row, 1.42, 1.42), label)
    left = 0.1 + 1.5 * IN_FIGURE + 1.7
    _draw_classes(axes(left, 0.45, width - left - 0.2, height - 1.0), epochs[-1])
    save(figure, path)


def _draw_label(axis: Any, label: ShownLabel) -> None:
    axis.set_axis_on()
    axis.imshow(label.pixels)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set(color=_colour(label.truth), linewidth=3)
    name = label.name if len(label.name) <= 18 else label.name[:17] + "…"
    axis.set_title(name.replace("$", r"\$"), fontsize=9, loc="left")
    axis.set_xlabel(f"loss {label.loss:.1f}", fontsize=8)


def _draw_classes(axis: Any, shown: ShownEpoch) -> None:
    classes = shown.classes[:CLASSES_IN_FIGURE][::-1]
    places = range(len(classes))
    axis.barh(places, [one.rejected for one in classes], color=_SOFT, label="rejected")
    if shown.false_negatives is not None:
        axis.barh(places, [one.false_negatives or 0 for one in classes], color=_DARK, label="of them truly positive")
    names = [one.name if len(one.name) <= 22 else one.name[:21] + "…" for one in classes]
    axis.set_yticks(places, [name.replace("$", r"\$") for name in names], fontsize=9)
    axis.set_title(f"Classes rejected most, epoch {shown.epoch}", loc="left", fontweight="bold", fontsize=11)
    axis.set_xlabel("labels")
    axis.set_ylim(-0.7, max(CLASSES_IN_FIGURE / 2, len(classes)) - 0.3)
    plain_axes(axis)
    axis.grid(axis="y", visible=False)
    axis.legend(frameon=False, loc="lower right", fontsize=9)


def _colour(truth: bool | None) -> str:
    return _UNKNOWN if truth is None else _TRUE if truth else _FALSE


def _said(shown: ShownEpoch) -> str:
    if shown.false_negatives is None:
        return f"{shown.rejected:,} labels rejected"
    share = 100 * shown.false_negatives / shown.rejected
    return f"{shown.rejected:,} labels rejected, {shown.false_negatives:,} of them truly positive ({share:.0f} %)"


_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; color: #1c2024; background: #fff; margin: 24px; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 28px 0 2px; }
h3 { font-size: 14px; margin: 12px 0 6px; }
p { margin: 2px 0; max-width: 100ch; }
nav a { margin-right: 12px; }
.labels { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 148px; font-size: 12px; border: 3px solid #777; border-radius: 6px; overflow: hidden; }
figure.true { border-color: #1a7f37; } figure.false { border-color: #c4320a; }
figure img { width: 148px; height: 148px; object-fit: contain; display: block; background: #f1f3f5; }
figcaption { padding: 4px 6px; overflow-wrap: anywhere; }
figcaption b { display: block; } small { color: #60646c; display: block; }
.true em { color: #1a7f37; } .false em { color: #c4320a; } em { font-style: normal; font-weight: 600; color: #777; }
table { border-collapse: collapse; } th, td { text-align: right; padding: 1px 12px 1px 0; }
th:first-child, td:first-child { text-align: left; }
"""


def gallery_html(title: str, epochs: Sequence[ShownEpoch]) -> str:
    """One file with pictures, scores, losses and classes of each epoch, the last one first."""
    shown = list(reversed(epochs))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{source_digest(_STYLE)}'; base-uri 'none'; form-action 'none'"
    )
    links = "".join(f'<a href="#epoch-{one.epoch}">epoch {one.epoch}</a>' for one in shown)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}"><style>{_STYLE}</style></head><body>'
        f"<h1>Rejected labels of {escape(title)}</h1>"
        "<p>Unobserved labels that the training took for suspected false negatives. p is the score that the label had "
        "when it was rejected, the loss what it would have cost as a negative, &minus;log(1 &minus; p).</p>"
        f"<nav>{links}</nav>" + "".join(map(_section, shown)) + "</body></html>"
    )


def _section(shown: ShownEpoch) -> str:
    parts = [
        f'<h2 id="epoch-{shown.epoch}">Epoch {shown.epoch}: {_said(shown)}</h2>',
        "<h3>Rejected most strongly</h3>",
        _cards(shown.strongest),
        "<h3>Drawn by lot from all that were rejected: the share of right ones among these tells the precision</h3>",
        _cards(shown.drawn),
        "<h3>Classes rejected most</h3>",
        _table(shown),
    ]
    return "".join(parts)


def _cards(labels: Sequence[ShownLabel]) -> str:
    return '<div class="labels">' + "".join(map(_card, labels)) + "</div>"


def _card(label: ShownLabel) -> str:
    kind, said = {True: ("true", "truly positive"), False: ("false", "not positive"), None: ("", "truth not known")}[
        label.truth
    ]
    picture = base64.b64encode(thumbnail(label.pixels, SIDE, PICTURE_BYTES)).decode()
    return (
        f'<figure class="{kind}"><img alt="{escape(label.key)}" src="data:image/jpeg;base64,{picture}"><figcaption>'
        f"<b>{escape(label.name)}</b>p {label.chance:.3f}, loss {label.loss:.2f}<br><em>{said}</em>"
        f"<small>{escape(label.mid)}</small><small>{escape(label.key)}</small></figcaption></figure>"
    )


def _table(shown: ShownEpoch) -> str:
    known = shown.false_negatives is not None
    more = "<th>truly positive</th><th>share</th>" if known else ""
    lines = [f"<table><tr><th>class</th><th>MID</th><th>rejected</th>{more}</tr>"]
    for one in shown.classes:
        true = one.false_negatives or 0
        cells = f"<td>{true:,}</td><td>{100 * true / one.rejected:.0f} %</td>" if known else ""
        lines.append(f"<tr><td>{escape(one.name)}</td><td>{escape(one.mid)}</td><td>{one.rejected:,}</td>{cells}</tr>")
    return "".join(lines) + "</table>"
