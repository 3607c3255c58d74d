"""Look at label tables and make new ones of them: `python -m paml.labels info|cut|merge|split|csv|verdicts --help`."""

import sys

import numpy as np

from paml import storage
from paml.labels import edit
from paml.labels.build import read_classes
from paml.labels.settle import ConflictRule
from paml.labels.states import LabelError
from paml.labels.table import LabelTable
from paml.labels.verdicts import apply_verdicts


def info(table: str) -> None:
    """Say what a table holds, after checking every byte of it.

    Args:
        table: the label table.
    """
    opened = LabelTable.open(table)
    opened.verify()
    positives, negatives = opened.class_counts()
    both = positives + negatives
    unlabelled = int((opened.label_counts(np.arange(opened.num_images)) == 0).sum())
    print(f"{opened.num_images:,} images, {unlabelled:,} of them without a label")
    print(f"{opened.num_annotations:,} labels: {int(positives.sum()):,} positive, {int(negatives.sum()):,} negative")
    print(f"{opened.num_classes:,} classes, {int((both > 0).sum()):,} of them with a label")
    for number in np.argsort(-both, kind="stable")[:5].tolist():
        print(f"  {opened.classes[number]} {opened.names[number]}: {positives[number]:,} + {negatives[number]:,}")
    print(f"digest {opened.digest}")
    for name, value in opened.metadata.items():
        if name not in ("classes", "names", "digest", "kind", "num_images", "num_annotations"):
            print(f"{name}: {value}")


def cut(table: str, out: str, classes: str | None = None, images: str | None = None) -> None:
    """Write the part of a table on some classes, some images or both.

    Args:
        table: the label table.
        out: the table to write.
        classes: file with one MID a line, or a class CSV; its order becomes that of the classes.
        images: file with one key a line.
    """
    keys = None if images is None else storage.read_bytes(images).decode("utf-8", "replace").split("\n")
    keys = None if keys is None else [key.rstrip("\r") for key in keys if key.strip()]
    mids = None if classes is None else read_classes(classes)
    print(edit.cut(LabelTable.open(table), out, classes=mids, images=keys))


def merge(tables: list[str], out: str, conflict: ConflictRule = "negative") -> None:
    """Write one table with the images, classes and labels of several.

    Args:
        tables: the label tables.
        out: the table to write.
        conflict: what becomes of a pair that is POSITIVE in one and NEGATIVE in another.
    """
    print(edit.merge(tables, out, conflict=conflict))


def split(table: str, outs: list[str], shares: list[float], seed: int = 0) -> None:
    """Write the images of a table to several tables, a share to each.

    Args:
        table: the label table.
        outs: the tables to write.
        shares: the share of each; they add up to 1.
        seed: another seed draws other images.
    """
    for part in edit.split(LabelTable.open(table), outs, shares, seed):
        print(part)


def csv(table: str, out: str, classes: str | None = None) -> None:
    """Write the labels of a table as ImageID,Source,LabelName,Confidence.

    Args:
        table: the label table.
        out: the CSV file to write.
        classes: class list to write too, as MID,name.
    """
    opened = LabelTable.open(table)
    edit.export_csv(opened, out)
    if classes is not None:
        edit.export_classes(opened, classes)


def verdicts(table: str, files: list[str], out: str) -> None:
    """Write a new version of a table, with the verdicts of people merged in.

    Args:
        table: the label table.
        files: CSV files that the page of an audit exported.
        out: the table to write.
    """
    print(apply_verdicts(LabelTable.open(table), files, out))


def main(args: list[str] | None = None) -> int:
    """Run one command; status 0, or 1 after saying what is wrong."""
    from jsonargparse import auto_cli

    try:
        auto_cli([info, cut, merge, split, csv, verdicts], args=args, prog="python -m paml.labels")
    except (LabelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
