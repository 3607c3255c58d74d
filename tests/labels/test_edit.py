"""Tables made from tables equal the same change of a plain dictionary of pairs."""

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
    cut,
    export_classes,
    export_csv,
    keep,
    merge,
    split,
    split_by_keys,
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


def check_sound(table: LabelTable, pairs: Pairs, keys: set[str]) -> None:
    assert pairs_of(table) == pairs
    assert table.keys() == sorted(keys)
    assert table.digest == write(Path(table.path).parent, (sorted(keys), list(table.classes), pairs), "same").digest
    table.verify()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("edit")


@given(tables(), st.data())
@settings(max_examples=40, deadline=None)
def test_cut(folder: Path, case: tuple, data: st.DataObject) -> None:
    keys, mids, pairs = case
    table = write(folder, case)
    classes = data.draw(
        st.none() | st.permutations(mids).flatmap(lambda m: st.integers(1, len(m)).map(lambda n: m[:n]))
    )
    images = data.draw(st.none() | st.lists(st.sampled_from(keys), unique=True))
    part = cut(table, str(folder / "cut.arrow"), classes=classes, images=images)
    in_images, in_classes = set(keys if images is None else images), mids if classes is None else classes
    assert part.classes == tuple(in_classes)
    assert part.names == tuple(f"name of {mid}" for mid in in_classes)
    check_sound(part, {p: s for p, s in pairs.items() if p[0] in in_images and p[1] in in_classes}, in_images)


@given(tables(), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_keep(folder: Path, case: tuple, seed: int) -> None:
    keys, _, pairs = case
    table = write(folder, case)
    positive = keep(table, str(folder / "kept.arrow"), lambda labels: labels.state == POSITIVE)
    check_sound(positive, {pair: state for pair, state in pairs.items() if state == POSITIVE}, set(keys))
    mask = np.random.default_rng(seed).random(table.num_annotations) < 0.5
    some = keep(table, str(folder / "kept.arrow"), mask)
    assert list(pairs_of(some).items()) == [
        item for item, kept in zip(pairs_of(table).items(), mask, strict=True) if kept
    ]


@given(st.lists(tables(), min_size=1, max_size=3), st.sampled_from(["negative", "positive", "drop"]))
@settings(max_examples=60, deadline=None)
def test_merge(folder: Path, cases: list, rule: str) -> None:
    opened = [write(folder, case, f"{number}.arrow") for number, case in enumerate(cases)]
    said: dict[tuple[str, str], list[int]] = {}
    for _, _, pairs in cases:
        for pair, state in pairs.items():
            said.setdefault(pair, []).append(state)
    winner = {"negative": min, "positive": max, "drop": lambda _: None}[rule]
    both = {pair for pair, states in said.items() if len(set(states)) == 2}
    expected = {pair: winner(states) if pair in both else states[0] for pair, states in said.items()}
    expected = {pair: state for pair, state in expected.items() if state is not None}
    report = merge([opened[0], *(table.path for table in opened[1:])], str(folder / "merged.arrow"), conflict=rule)
    check_sound(report.table, expected, {key for keys, _, _ in cases for key in keys})
    assert list(report.table.classes) == list(dict.fromkeys(mid for _, mids, _ in cases for mid in mids))
    assert report.conflicting_pairs == len(both)
    assert report.contradictions == sum(
        states.count(s) for p, states in said.items() if p in both for s in (0, 1) if s != expected.get(p)
    )
    assert report.annotations + report.duplicates + report.contradictions == sum(len(pairs) for _, _, pairs in cases)


@given(tables(), st.lists(st.integers(0, 5), min_size=1, max_size=4).filter(any), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_split_and_merge_again(folder: Path, case: tuple, weights: list[int], seed: int) -> None:
    table = write(folder, case)
    outs = [str(folder / f"part{number}.arrow") for number in range(len(weights))]
    parts = split(table, outs, [weight / sum(weights) for weight in weights], seed)
    assert sorted(itertools.chain(*(part.keys() for part in parts))) == table.keys()
    for part, weight in zip(parts, weights, strict=True):
        assert weight or not part.num_images
        keys = set(part.keys())
        check_sound(part, {pair: state for pair, state in pairs_of(table).items() if pair[0] in keys}, keys)
    assert merge(parts, str(folder / "whole.arrow")).table.digest == table.digest


def test_a_split_has_its_shares_and_keeps_its_images_as_the_table_grows(folder: Path) -> None:
    keys = [f"{value:016x}" for value in range(20_000)]
    whole = write(folder, (keys, ["/m/a"], {}), "whole.arrow")
    outs = [str(folder / f"{number}.arrow") for number in range(3)]
    parts = split(whole, outs, [0.7, 0.2, 0.1], 5)
    for part, share in zip(parts, (0.7, 0.2, 0.1), strict=True):
        assert abs(part.num_images - share * 20_000) < 5 * np.sqrt(share * (1 - share) * 20_000)
    train = set(parts[0].keys())
    half = write(folder, ([*keys[::2], "a photo"], ["/m/a"], {}), "half.arrow")
    first, *_ = split(half, [str(folder / f"h{number}.arrow") for number in range(3)], [0.7, 0.2, 0.1], 5)
    assert set(first.keys()) - {"a photo"} == train & set(keys[::2])
    other = split(whole, outs, [0.7, 0.2, 0.1], 6)[0]
    assert 0.4 < len(train & set(other.keys())) / 20_000 < 0.6


def test_split_by_keys(folder: Path) -> None:
    table = write(folder, (KEYS, MIDS, {(key, "/m/a"): 1 for key in KEYS}))
    one, two, rest = (str(folder / f"{name}.arrow") for name in ("one", "two", "rest"))
    parts = split_by_keys(table, {one: [KEYS[3], KEYS[0]], two: KEYS[5:]}, rest)
    assert [set(part.keys()) for part in parts] == [{KEYS[0], KEYS[3]}, set(KEYS[5:]), {KEYS[1], KEYS[2], KEYS[4]}]
    assert [part.has_hex_keys for part in parts] == [True, False, True]
    assert len(split_by_keys(table, {one: KEYS[:4], two: KEYS[4:]}, None)) == 2
    with pytest.raises(
        LabelError, match=r"1 images stand in two parts, .*one.arrow' and .*two.arrow', the first is 'z'"
    ):
        split_by_keys(table, {one: ["z"], two: KEYS}, rest)
    with pytest.raises(
        LabelError, match=r"7 images of label table .* stand in no part, the first is '0000000000000000'"
    ):
        split_by_keys(table, {one: ["z"]}, None)


@given(tables().filter(lambda case: case[2]))
@settings(max_examples=25, deadline=None)
def test_csv_and_back(folder: Path, case: tuple) -> None:
    _, mids, pairs = case
    table = write(folder, (sorted({key for key, _ in pairs}), mids, pairs))
    export_csv(table, str(folder / "back.csv"))
    export_classes(table, str(folder / "classes.csv"))
    classes = str(folder / "classes.csv")
    report = build_label_table(str(folder / "back.csv"), classes, str(folder / "back.arrow"), descriptions=classes)
    assert report.digest == table.digest
    assert report.rows == report.annotations == len(pairs)
    rows = pacsv.read_csv(folder / "back.csv", convert_options=pacsv.ConvertOptions(column_types={"ImageID": "string"}))
    assert rows.column_names == ["ImageID", "Source", "LabelName", "Confidence"]
    found = zip(*(rows[name].to_pylist() for name in ("ImageID", "LabelName", "Confidence")), strict=True)
    assert {(key, mid): state for key, mid, state in found} == pairs


def test_what_cannot_be_done_is_named(folder: Path) -> None:
    table = write(folder, (["a", "b"], ["/m/a", "/m/b"], {("a", "/m/a"): 1, ("b", "/m/b"): 1}))
    against = write(folder, (["a"], ["/m/a"], {("a", "/m/a"): 0}), "against.arrow")
    out = str(folder / "out.arrow")
    for change, message in [
        (lambda: cut(table, out, classes=["/m/a", "/m/q"]), r"1 of 2 classes are not in label table .* '/m/q'"),
        (lambda: cut(table, out, classes=["/m/a", "/m/a"]), "class '/m/a' is named twice"),
        (lambda: cut(table, out, classes=[]), "there are no classes"),
        (lambda: cut(table, out, images=["a", "c"]), r"1 of 2 keys are not in label table .* the first is 'c'"),
        (lambda: cut(table, out, images=["a", "b", "a"]), "image 'a' is named twice"),
        (lambda: cut(table, table.path), "would be written over itself"),
        (lambda: keep(table, out, np.ones(3, bool)), r"type bool and shape \(3,\), allowed is bool"),
        (lambda: keep(table, out, lambda labels: labels.state), "type int8"),
        (lambda: merge([], out), "there are no label tables to merge"),
        (lambda: merge([table], out, conflict="both"), "conflict is 'both', allowed are negative"),
        (lambda: merge([table, against], out, conflict="error"), r"1 pairs .*: image a and class /m/a"),
        (lambda: split(table, [out], [0.5], 0), r"the shares are \[0.5\], allowed are numbers"),
        (lambda: split(table, [out], [0.5, 0.5], 0), "2 shares for 1 tables"),
    ]:  # fmt: skip
        with pytest.raises(LabelError, match=message):
            change()
    assert not Path(out).exists()
