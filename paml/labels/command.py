"""`paml labels`: inspect label tables and make new ones from them."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np

from paml.errors import LabelError, UsageError
from paml.labels import edit
from paml.labels.class_list import read_classes, read_text
from paml.labels.parquet import export_parquet
from paml.labels.resolve import CONFLICT_RULES
from paml.labels.table import LabelTable
from paml.labels.verdicts import apply_verdicts


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


def add_subcommands(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands to a parser. Each sets `run`, a function of the parsed arguments."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, run: Callable[[Any], None], description: str, *, table: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=description, description=description, allow_abbrev=False)
        command.set_defaults(run=run)
        if table:
            command.add_argument("table", help="label table")
        return command

    add("info", _info, "print what a table holds, after a check of the whole file")

    command = add("filter", _filter, "write the part of a table with some classes, some images or both")
    command.add_argument("out", help="table to write")
    command.add_argument("--classes", metavar="FILE", help="one class (MID) per line, or a class CSV; sets their order")
    command.add_argument("--images", metavar="FILE", help="one key per line")

    command = add("merge", _merge, "write one table with the images, classes and labels of several", table=False)
    command.add_argument("tables", nargs="+", metavar="table", help="label tables")
    command.add_argument("out", help="table to write")
    command.add_argument(
        "--conflict", choices=list(CONFLICT_RULES), default="negative", help="state of a pair with both states"
    )

    command = add("split", _split, "write the images of a table to several tables, a random fraction to each")
    command.add_argument("outs", nargs="+", metavar="out", help="tables to write")
    command.add_argument(
        "--fractions", type=float, nargs="+", required=True, help="one per table to write; they add up to 1"
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the random sample")

    command = add("to-csv", _to_csv, "write the labels of a table as ImageID,Source,LabelName,Confidence")
    command.add_argument("out", help="CSV file to write")
    command.add_argument("--classes", metavar="FILE", help="also write the class list to this file, as MID,name")

    command = add(
        "to-parquet", _to_parquet, "write a row per image, with its positive and negative classes, for datasets"
    )
    command.add_argument("out", help="Parquet file to write")

    command = add("apply-verdicts", _apply_verdicts, "write a new version of a table with the verdicts of an audit")
    command.add_argument("files", nargs="+", metavar="file", help="CSV files that the audit page exported")
    command.add_argument("out", help="table to write")


def main(args: Sequence[str] | None = None) -> None:
    """Run one subcommand. Raises UsageError for bad arguments, LabelError and StorageError."""
    parser = _Parser(prog="paml labels", description=__doc__)
    add_subcommands(parser)
    parsed = parser.parse_args(args)
    parsed.run(parsed)


def _info(args: Any) -> None:
    table = LabelTable.open(args.table)
    positives, negatives = table.class_counts()
    labels = positives + negatives
    unlabeled = int((table.label_counts(np.arange(table.num_images)) == 0).sum())
    print(f"{table.num_images:,} images, {unlabeled:,} without a label")
    print(f"{table.num_annotations:,} labels: {int(positives.sum()):,} positive, {int(negatives.sum()):,} negative")
    print(f"{table.num_classes:,} classes, {int((labels > 0).sum()):,} with a label; the most frequent:")
    for number in np.argsort(-labels, kind="stable")[:5].tolist():
        print(f"  {table.classes[number]} {table.names[number]}: {positives[number]:,} + {negatives[number]:,}")
    print(f"digest {table.digest}")
    for name, value in table.metadata.items():
        if name not in ("classes", "names", "digest", "kind", "num_images", "num_annotations"):
            print(f"{name}: {value}")


def _filter(args: Any) -> None:
    edit.check_outputs([args.out], [path for path in (args.table, args.classes, args.images) if path is not None])
    table = LabelTable.open(args.table)
    classes = images = None
    if args.classes is not None:
        classes = read_classes(args.classes)
        known = set(table.classes)
        unknown = [cls for cls in classes if cls not in known]
        _check_listed(args.classes, "classes", unknown, len(classes), table)
    if args.images is not None:
        images = [line.rstrip("\r") for line in read_text(args.images).split("\n") if line.strip()]
        if not images:
            raise LabelError(f"image list {args.images!r} is empty: put one key on each line")
        unknown = [images[row] for row in np.flatnonzero(table.rows_of(images) < 0)]
        _check_listed(args.images, "keys", unknown, len(images), table)
    print(edit.filter_table(table, args.out, classes=classes, images=images))


def _check_listed(path: str, kind: str, unknown: Sequence[str], count: int, table: LabelTable) -> None:
    if unknown:
        examples = table.classes[:1] if kind == "classes" else table.keys(range(min(1, table.num_images)))
        raise LabelError(
            f"{len(unknown):,} of {count:,} {kind} of {path!r} are not in label table {table.path!r}, such as "
            f"{unknown[0]!r}: list {kind} of the table, such as {', '.join(map(repr, examples))}"
        )


def _merge(args: Any) -> None:
    table = edit.merge(args.tables, args.out, conflict=args.conflict)
    duplicates, pairs = table.metadata["duplicates"], table.metadata["conflicting_pairs"]
    print(f"{table}; {duplicates:,} duplicates, {pairs:,} contradicting pairs ({CONFLICT_RULES[args.conflict]})")


def _split(args: Any) -> None:
    for part in edit.split(LabelTable.open(args.table), args.outs, args.fractions, args.seed):
        print(part)


def _to_csv(args: Any) -> None:
    edit.check_outputs([args.out] if args.classes is None else [args.out, args.classes], [args.table])
    table = LabelTable.open(args.table)
    edit.export_csv(table, args.out)
    if args.classes is not None:
        edit.export_classes(table, args.classes)


def _to_parquet(args: Any) -> None:
    export_parquet(LabelTable.open(args.table), args.out)


def _apply_verdicts(args: Any) -> None:
    print(apply_verdicts(LabelTable.open(args.table), args.files, args.out))
