"""Tables made from tables equal the same change of a dictionary of pairs."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow.csv as pacsv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paml.labels import (
    NEGATIVE,
    POSITIVE,
    LabelError,
    LabelTable,
    build_label_table,
    export_classes,
    export_csv,
    filter_labels,
    filter_table,
    merge,
    split,
    table_from_triples,
)
from tests.labels.test_table import pairs_of

KEYS = [f"{value:016x}" for value in (0, 1, 255, 2**63, 2**64 - 1)] + ["photo 1", 'a "quoted", one', "z"]
MIDS = ["/m/a", "/m/b", "/m/c", "d, e"]
Pairs = dict[tuple[str, str], int]
States = st.sampled_from([POSITIVE, NEGATIVE])


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[str], list[str], Pairs]:
    """(keys, MIDs, states): some keys have no label."""
    keys = draw(st.lists(st.sampled_from(KEYS[: draw(st.sampled_from([5, 8]))]), unique=True, min_size=1))
    mids = draw(st.lists(st.sampled_from(MIDS), unique=True, min_size=1))
    pair = st.tuples(st.sampled_from(keys), st.sampled_from(mids))
    return keys, mids, draw(st.dictionaries(pair, States, max_size=20))


def write(folder: Path, case: tuple[list[str], list[str], Pairs], name: str = "t.arrow") -> LabelTable:
    keys, mids, pairs = case
    image = [keys.index(key) for key, _ in pairs]
    cls = [mids.index(mid) for _, mid in pairs]
    names = [f"name of {mid}" for mid in mids]
    return table_from_triples(
        keys, mids, names, np.array(image, int), np.array(cls, int), [*pairs.values()], str(folder / name)
    )


def check_table(table: LabelTable, pairs: Pairs, keys: set[str]) -> None:
    assert pairs_of(table) == pairs
    assert table.keys() == sorted(keys)
    assert table.digest == write(Path(table.path).parent, (sorted(keys), list(table.classes), pairs), "same").digest


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("edit")


@given(tables(), st.data())
@settings(max_examples=40, deadline=None)
def test_filter_table(folder: Path, case: tuple, data: st.DataObject) -> None:
    keys, mids, pairs = case
    table = write(folder, case)
    classes = data.draw(
        st.none() | st.permutations(mids).flatmap(lambda m: st.integers(1, len(m)).map(lambda n: m[:n]))
    )
    images = data.draw(st.none() | st.lists(st.sampled_from(keys), unique=True))
    part = filter_table(table, str(folder / "part.arrow"), classes=classes, images=images)
    in_images, in_classes = set(keys if images is None else images), mids if classes is None else classes
    assert part.classes == tuple(in_classes)
    assert part.names == tuple(f"name of {mid}" for mid in in_classes)
    check_table(part, {p: s for p, s in pairs.items() if p[0] in in_images and p[1] in in_classes}, in_images)


@given(tables(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_filter_labels(folder: Path, case: tuple, seed: int) -> None:
    keys, _, pairs = case
    table = write(folder, case)
    positive = filter_labels(table, str(folder / "part.arrow"), lambda labels: labels.state == POSITIVE)
    check_table(positive, {pair: state for pair, state in pairs.items() if state == POSITIVE}, set(keys))
    mask = np.random.default_rng(seed).random(table.num_annotations) < 0.5
    some = filter_labels(table, str(folder / "part.arrow"), lambda labels: mask)
    assert list(pairs_of(some).items()) == [
        item for item, chosen in zip(pairs_of(table).items(), mask, strict=True) if chosen
    ]


@given(st.lists(tables(), min_size=1, max_size=3), st.sampled_from(["negative", "positive", "drop"]))
@settings(max_examples=60, deadline=None)
def test_merge(folder: Path, cases: list, rule: str) -> None:
    opened = [write(folder, case, f"{number}.arrow") for number, case in enumerate(cases)]
    votes: dict[tuple[str, str], list[int]] = {}
    for _, _, pairs in cases:
        for pair, state in pairs.items():
            votes.setdefault(pair, []).append(state)
    winner = {"negative": min, "positive": max, "drop": lambda _: None}[rule]
    both = {pair for pair, states in votes.items() if len(set(states)) == 2}
    expected = {pair: winner(states) if pair in both else states[0] for pair, states in votes.items()}
    expected = {pair: state for pair, state in expected.items() if state is not None}
    merged = merge([opened[0], *(table.path for table in opened[1:])], str(folder / "merged.arrow"), conflict=rule)
    check_table(merged, expected, {key for keys, _, _ in cases for key in keys})
    assert list(merged.classes) == list(dict.fromkeys(mid for _, mids, _ in cases for mid in mids))
    assert merged.metadata["conflicting_pairs"] == len(both)
    assert merged.metadata["contradictions"] == sum(
        states.count(s) for p, states in votes.items() if p in both for s in (0, 1) if s != expected.get(p)
    )
    removed = merged.metadata["duplicates"] + merged.metadata["contradictions"]
    assert merged.num_annotations + removed == sum(len(pairs) for _, _, pairs in cases)


@given(tables(), st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_split_then_merge(folder: Path, case: tuple, weights: list[int], seed: int) -> None:
    table = write(folder, case)
    outs = [str(folder / f"part{number}.arrow") for number in range(len(weights))]
    parts = split(table, outs, [weight / sum(weights) for weight in weights], seed)
    assert sorted(itertools.chain(*(part.keys() for part in parts))) == table.keys()
    for part, weight in zip(parts, weights, strict=True):
        assert weight or not part.num_images
        keys = set(part.keys())
        check_table(part, {pair: state for pair, state in pairs_of(table).items() if pair[0] in keys}, keys)
    assert merge(parts, str(folder / "whole.arrow")).digest == table.digest


def test_split_fractions_and_stability_as_the_table_grows(folder: Path) -> None:
    keys = [f"{value:016x}" for value in range(20_000)]
    whole = write(folder, (keys, ["/m/a"], {}), "whole.arrow")
    outs = [str(folder / f"{number}.arrow") for number in range(3)]
    parts = split(whole, outs, [0.7, 0.2, 0.1], 5)
    for part, fraction in zip(parts, (0.7, 0.2, 0.1), strict=True):
        assert abs(part.num_images - fraction * 20_000) < 5 * np.sqrt(fraction * (1 - fraction) * 20_000)
    train = set(parts[0].keys())
    half = write(folder, ([*keys[::2], "a photo"], ["/m/a"], {}), "half.arrow")
    first, *_ = split(half, [str(folder / f"h{number}.arrow") for number in range(3)], [0.7, 0.2, 0.1], 5)
    assert set(first.keys()) - {"a photo"} == train & set(keys[::2])
    other = split(whole, outs, [0.7, 0.2, 0.1], 6)[0]
    assert 0.4 < len(train & set(other.keys())) / 20_000 < 0.6


@given(tables().filter(lambda case: case[2]))
@settings(max_examples=25, deadline=None)
def test_csv_round_trip(folder: Path, case: tuple) -> None:
    _, mids, pairs = case
    table = write(folder, (sorted({key for key, _ in pairs}), mids, pairs))
    export_csv(table, str(folder / "back.csv"))
    export_classes(table, str(folder / "classes.csv"))
    classes = str(folder / "classes.csv")
    report = build_label_table(str(folder / "back.csv"), classes, str(folder / "back.arrow"), descriptions=classes)
    assert report.table.digest == table.digest
    assert report.rows == report.table.num_annotations == len(pairs)
    rows = pacsv.read_csv(folder / "back.csv", convert_options=pacsv.ConvertOptions(column_types={"ImageID": "string"}))
    assert rows.column_names == ["ImageID", "Source", "LabelName", "Confidence"]
    found = zip(*(rows[name].to_pylist() for name in ("ImageID", "LabelName", "Confidence")), strict=True)
    assert {(key, mid): state for key, mid, state in found} == pairs


def test_errors(folder: Path) -> None:
    table = write(folder, (["a", "b"], ["/m/a", "/m/b"], {("a", "/m/a"): 1, ("b", "/m/b"): 1}))
    against = write(folder, (["a"], ["/m/a"], {("a", "/m/a"): 0}), "against.arrow")
    out = str(folder / "out.arrow")
    for change, message in [
        (lambda: filter_table(table, out, classes=["/m/a", "/m/q"]), r"1 of 2 classes .* '/m/q'"),
        (lambda: filter_table(table, out, classes=["/m/a", "/m/a"]), "class '/m/a' is a duplicate"),
        (lambda: filter_table(table, out, classes=[]), "there are no classes"),
        (lambda: filter_table(table, out, images=["a", "c"]), r"1 of 2 keys are not in label table .* such as 'c'"),
        (lambda: filter_table(table, out, images=["a", "b", "a"]), "image 'a' is listed twice"),
        (lambda: filter_table(table, table.path), "overwrite"),
        (lambda: filter_labels(table, out, lambda labels: np.ones(3, bool)), r"type bool and shape \(3,\)"),
        (lambda: filter_labels(table, out, lambda labels: labels.state), "type int8"),
        (lambda: merge([], out), "no label tables"),
        (lambda: merge([table], out, conflict="both"), "conflict is 'both', allowed are negative"),
        (lambda: merge([table, against], out, conflict="error"), r"1 pairs .* image a and class /m/a"),
        (lambda: split(table, [out], [0.5], 0), r"fractions are \[0.5\]"),
        (lambda: split(table, [out], [0.5, 0.5], 0), "2 fractions for 1 tables"),
    ]:  # fmt: skip
        with pytest.raises(LabelError, match=message):
            change()
    assert not Path(out).exists()
