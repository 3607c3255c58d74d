"""Injected faults in tar files, read by paml and by stock WebDataset: wrong, lost and duplicated images.

Run: python -m benchmarks.faults [--per-kind 50] [--out faults.md]

Faults of the manifest and of the label table are left out, since WebDataset has neither. WebDataset reads the shards
that a fault affects with the pipeline of its documentation, which raises its errors: WebDataset(urls,
shardshuffle=False).decode("pil").to_tuple("__key__", "jpg"). paml reads with the reader that training uses. An image is
wrong if its pixels or its key differ from what was written, lost if it is missing without an error, and not delivered
if it is missing and an error reports it.
"""

import argparse
import dataclasses
import io
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from tests.helpers.faults import TABLE, Fault, Injected, Prepared, draw_faults, judge, prepare


@dataclasses.dataclass
class Counts:
    """Counts of the faults of one kind."""

    faults: int = 0
    silent: int = 0
    """Faults with a wrong, lost or duplicated image and no error."""
    wrong: int = 0
    """Images with wrong pixels or a wrong key."""
    lost: int = 0
    """Images that were missing without an error."""
    duplicated: int = 0
    """Images delivered more than once."""
    raised: int = 0
    """Faults with an error."""
    not_delivered: int = 0
    """Images that were missing and reported by an error."""


def pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def stock(tars: list[str]) -> Iterator[tuple[str, Any]]:
    """(key, image) from a stock pipeline."""
    import webdataset as wds

    pipeline: Any = cast(Any, wds).WebDataset(tars, shardshuffle=False, empty_check=False)
    yield from pipeline.decode("pil").to_tuple("__key__", "jpg")


def read_stock(prepared: Prepared, fault: Fault, truth: dict[str, np.ndarray], counts: Counts) -> None:
    """Inject a fault and read the shards that it affects."""
    names = sorted(fault.files)
    copied = [data for data in fault.files.values() if data is not None]
    names = sorted({*names, *(tar for tar in prepared.tars if prepared.files[tar] in copied)})
    expected = set().union(*(prepared.keys_of(tar) for tar in names if tar in prepared.members))
    delivered: list[str] = []
    wrong, raised = 0, False
    with Injected(prepared, fault):
        try:
            for key, image in stock([prepared.path(name) for name in names]):
                delivered.append(key)
                wrong += key not in truth or not np.array_equal(np.asarray(image), truth[key])
        except Exception:  # any error reports the fault
            raised = True
    missing = len(expected - set(delivered))
    duplicated = len(delivered) - len(set(delivered))
    counts.faults += 1
    counts.raised += raised
    counts.wrong += wrong
    counts.duplicated += duplicated
    counts.lost += 0 if raised else missing
    counts.not_delivered += missing if raised else 0
    counts.silent += not raised and bool(wrong or missing or duplicated)


def read_paml(prepared: Prepared, fault: Fault, counts: Counts) -> None:
    """Inject a fault and read all shards."""
    outcome = judge(prepared, fault)
    counts.faults += 1
    counts.wrong += outcome.wrong
    counts.lost += outcome.unnamed
    counts.not_delivered += outcome.not_delivered
    counts.raised += outcome.detected
    counts.silent += bool(outcome.wrong or outcome.unnamed)


def table(kinds: dict[str, tuple[Counts, Counts]]) -> str:
    """A Markdown table with one row per kind."""
    columns = ("silent", "wrong", "lost", "duplicated", "raised", "not_delivered")
    headings = [f"{side} {column.replace('_', ' ')}" for side in ("wds", "paml") for column in columns]
    lines = ["| fault | n | " + " | ".join(headings) + " |", "|---|" + "---:|" * (len(headings) + 1)]
    for kind, sides in kinds.items():
        cells = [f"{getattr(side, column):,}" for side in sides for column in columns]
        lines.append(f"| {kind} | {sides[0].faults:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        prepared = prepare(Path(folder) / "intact")
        truth = {key: pixels(data) for key, data in prepared.images.items()}
        kinds: dict[str, tuple[Counts, Counts]] = {}
        total = Counts(), Counts()
        for fault in draw_faults(prepared, options.per_kind, options.seed):
            if any(name == TABLE or not name.endswith(".tar") for name in fault.files):
                continue
            wds, paml = kinds.setdefault(fault.kind, (Counts(), Counts()))
            read_stock(prepared, fault, truth, wds)
            read_paml(prepared, fault, paml)
    for sides in list(kinds.values()):
        for side, counts in zip(total, sides, strict=True):
            for field in dataclasses.fields(Counts):
                setattr(side, field.name, getattr(side, field.name) + getattr(counts, field.name))
    text = table(kinds | {"all": total})
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
