"""The same injected faults read by paml and by a stock WebDataset pipeline: what is wrong, lost or doubled in silence.

Run: python -m benchmarks.faults [--per-kind 50] [--out faults.md]

Faults of tar files alone, since WebDataset has neither manifest nor label table. Its pipeline is that of its
documentation: WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "jpg"), which raises what it
finds, over the shards that the fault touches. An image is wrong where its pixels, or the key that it comes with,
are not those that were written; lost where it does not come and nothing is raised; kept back where it does not come
and an error says so. Of paml, the reader by which training reads.
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
    """Of the faults of one kind."""

    faults: int = 0
    silent: int = 0
    """Faults under which an image was wrong, lost or doubled, and nothing was raised or named."""
    wrong: int = 0
    """Images delivered wrong."""
    lost: int = 0
    """Images lost in silence."""
    doubled: int = 0
    """Images delivered more than once."""
    raised: int = 0
    """Faults that raised or were named."""
    kept_back: int = 0
    """Images not delivered, and an error said so."""


def pixels(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def stock(tars: list[str]) -> Iterator[tuple[str, Any]]:
    """(key, picture) as a stock pipeline delivers them."""
    import webdataset as wds

    pipeline: Any = cast(Any, wds).WebDataset(tars, shardshuffle=False, empty_check=False)
    yield from pipeline.decode("pil").to_tuple("__key__", "jpg")


def read_stock(prepared: Prepared, fault: Fault, truth: dict[str, np.ndarray], counts: Counts) -> None:
    """Inject a fault and read the shards that it touches."""
    names = sorted(fault.files)
    copied = [data for data in fault.files.values() if data is not None]
    names = sorted({*names, *(tar for tar in prepared.tars if prepared.files[tar] in copied)})
    expected = set().union(*(prepared.keys_of(tar) for tar in names if tar in prepared.members))
    delivered: list[str] = []
    wrong, raised = 0, False
    with Injected(prepared, fault):
        try:
            for key, picture in stock([prepared.path(name) for name in names]):
                delivered.append(key)
                wrong += key not in truth or not np.array_equal(np.asarray(picture), truth[key])
        except Exception:  # whatever it says, it has said something
            raised = True
    missing = len(expected - set(delivered))
    doubled = len(delivered) - len(set(delivered))
    counts.faults += 1
    counts.raised += raised
    counts.wrong += wrong
    counts.doubled += doubled
    counts.lost += 0 if raised else missing
    counts.kept_back += missing if raised else 0
    counts.silent += not raised and bool(wrong or missing or doubled)


def read_paml(prepared: Prepared, fault: Fault, counts: Counts) -> None:
    """Inject a fault and read all shards."""
    outcome = judge(prepared, fault)
    counts.faults += 1
    counts.wrong += outcome.wrong
    counts.lost += outcome.unnamed
    counts.kept_back += outcome.kept_back
    counts.raised += outcome.found
    counts.silent += bool(outcome.wrong or outcome.unnamed)


def table(kinds: dict[str, tuple[Counts, Counts]]) -> str:
    """As a Markdown table, a line a kind."""
    columns = ("silent", "wrong", "lost", "doubled", "raised", "kept_back")
    head = [f"{side} {column.replace('_', ' ')}" for side in ("wds", "paml") for column in columns]
    lines = ["| fault | n | " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) + 1)]
    for kind, sides in kinds.items():
        cells = [f"{getattr(side, column):,}" for side in sides for column in columns]
        lines.append(f"| {kind} | {sides[0].faults:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Inject, read both ways, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore", ResourceWarning)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        prepared = prepare(Path(folder) / "sound")
        truth = {key: pixels(data) for key, data in prepared.images.items()}
        kinds: dict[str, tuple[Counts, Counts]] = {}
        total = Counts(), Counts()
        for fault in draw_faults(prepared, chosen.per_kind, chosen.seed):
            if any(name == TABLE or not name.endswith(".tar") for name in fault.files):
                continue
            wds, own = kinds.setdefault(fault.kind, (Counts(), Counts()))
            read_stock(prepared, fault, truth, wds)
            read_paml(prepared, fault, own)
    for sides in list(kinds.values()):
        for side, one in zip(total, sides, strict=True):
            for field in dataclasses.fields(Counts):
                setattr(side, field.name, getattr(side, field.name) + getattr(one, field.name))
    text = table(kinds | {"all": total})
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
