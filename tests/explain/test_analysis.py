"""The analysis of maps between runs: what it measures, writes and refuses."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scipy import stats

from paml.errors import DataError, PamlError, SettingsError
from paml.explain.analysis import ExplainSettings, drawn_images, explain, measure
from paml.explain.boxes import read_boxes
from paml.explain.rejected import draw_rejected
from paml.explain.report import KINDS, Measured, summary
from paml.explain.runs import OpenRun, open_runs, parse_run
from paml.labels import POSITIVE
from paml.models.cam import build_model
from paml.shards.manifest import Manifest
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.data import eval_loader, open_split
from paml.training.settings import TrainSettings, flatten
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, SIZE, key_of, prepare_tiny, tiny_settings, true_classes
from tests.helpers.runs import run

RAISED = 0.45


def _trained(root: Path, storage: Path, name: str, **changes) -> str:
    settings = tiny_settings(root, storage, run={"name": name}, checkpoint={"keep": None}, **changes)
    assert run(settings) is not None
    return _opened(settings)


def _opened(settings: TrainSettings) -> str:
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return str(folder)


def _size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as opened:
        return opened.size


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    storage = tmp_path_factory.mktemp("runs")
    unboosted = {"boost": {"train": 1.0, "eval": 1.0, "eval_also": (5.0,)}}
    return {
        "an": _trained(prepared, storage, "an", loss={"name": "an"}, epochs=2, **unboosted),
        "llr": _trained(prepared, storage, "llr", data={"train_truth": "labels/train-full.arrow"}, epochs=2),
    }


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The true places of the tiny pictures' blocks, of every other image."""
    lines = ["ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax"]
    for number in range(0, COUNTS["test"], 2):
        for cls in np.flatnonzero(true_classes("test", number)):
            x, y = cls % 4 / 4, cls // 4 / 4
            lines.append(f"{key_of('test', number)},xclick,{CLASSES[cls]},1,{x},{x + 0.25},{y},{y + 0.25}")
    path = tmp_path_factory.mktemp("boxes") / "test.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def specs(folders: dict[str, str]) -> dict[str, str]:
    return {"AN": folders["an"], "AN + boost": f"{folders['an']}@newest:alpha=5", "LL-R + BoostLU": folders["llr"]}


@pytest.fixture(scope="module")
def done(specs: dict[str, str], boxes: Path, tmp_path_factory: pytest.TempPathFactory):
    out, said = tmp_path_factory.mktemp("out"), []
    settings = ExplainSettings(runs=specs, boxes=str(boxes), examples=2, batch_size=5, out=str(out))
    return explain(settings, said.append), out, said


def test_every_label_of_the_split_is_measured_once_whatever_the_batches(done, prepared: Path) -> None:
    measured, _, _ = done
    assert len(measured.cls) == COUNTS["test"] * len(CLASSES)
    assert len(np.unique(measured.index * len(CLASSES) + measured.cls)) == len(measured.cls)
    manifest = Manifest.open(prepared / "shards" / "test")
    for place in range(COUNTS["test"]):
        own = measured.index == place
        truth = true_classes("test", int(manifest.key(place)[2:], 16))
        np.testing.assert_array_equal(measured.state[own] == POSITIVE, truth[measured.cls[own]])


@pytest.fixture(scope="module")
def raised(specs: dict[str, str], boxes: Path) -> tuple[list[OpenRun], Measured]:
    """The runs with every score raised, so that maps have positive and negative ones after so little training."""
    runs = open_runs(specs)
    for model in {id(opened.model): opened.model for opened in runs}.values():
        with torch.no_grad():
            model.head.bias += RAISED
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    found = read_boxes(str(boxes), [split.manifest.key(place) for place in range(COUNTS["test"])], CLASSES)
    return runs, measure(runs, 0, eval_loader(runs[0].settings, split, SIZE, World()), split, boxes=found, size=SIZE)


def test_figures_are_those_of_the_maps_of_the_checkpoints(raised: tuple[list[OpenRun], Measured]) -> None:
    runs, measured = raised
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    (batch,) = eval_loader(dataclasses.replace(runs[0].settings, eval_batch_size=32), split, SIZE, World())
    reference, positive = None, 0
    for at, opened in enumerate(runs):
        model = build_model(opened.settings.model, len(CLASSES))
        model.load_state_dict(read_checkpoint(opened.folder, opened.checkpoint).tensors["weights"])
        with torch.no_grad():
            images = (batch.images / 255.0 - torch.tensor(opened.settings.model.pixel_mean)) / 0.25
            raw = model.eval().maps(images.permute(0, 3, 1, 2)).double().numpy() + RAISED
        reference = raw if reference is None else reference
        for place in (3, 100, 171):
            image, cls = measured.index[place], measured.cls[place]
            own, other = raw[image, cls], reference[image, cls]
            positive += int((own > 0).sum())
            for kind, alpha in ((0, 1.0), (1, opened.alpha)):
                figures = dict(zip(Measured.FIGURES, measured.values[at, kind, :, place], strict=True))
                scores = np.where(own > 0, alpha * own, own)
                assert figures["logit"] == pytest.approx(scores.mean(), abs=1e-4)
                assert figures["top"] == pytest.approx(scores.max(), abs=1e-4)
                assert figures["bottom"] == pytest.approx(scores.min(), abs=1e-4)
                if at == 0:  # the reference, whose alpha is 1
                    assert math.isnan(figures["spearman"])
                    continue
                assert figures["mean_absolute_difference"] == pytest.approx(np.abs(scores - other).mean(), abs=1e-4)
                expected = stats.spearmanr(own.ravel(), other.ravel()).statistic
                assert figures["spearman"] == pytest.approx(expected, abs=1e-2)  # rounding swaps close scores
    assert positive > 10


def test_a_run_beside_itself_with_another_alpha_has_the_same_raw_maps(raised, specs: dict[str, str]) -> None:
    opened = open_runs(specs | {"AN, newest": specs["AN"] + "@newest"})
    assert opened[3].model is opened[1].model
    assert [run.alpha for run in opened] == [1, 5, 5, 1]
    _, measured = raised
    raw, boosted = measured.figure("top")[1]
    assert (boosted >= raw).all()
    assert (boosted > raw).any()
    np.testing.assert_array_equal(*measured.figure("top")[0])


def test_boxes_are_those_of_the_label_and_scored_alike_raw_and_boosted(raised) -> None:
    _, measured = raised
    assert measured.boxed.sum() == sum(true_classes("test", number).sum() for number in range(0, COUNTS["test"], 2))
    for name in ("pointing_hit", "box_iou"):
        values = measured.figure(name)
        assert (np.isnan(values) == ~measured.boxed).all()
        np.testing.assert_array_equal(values[:, 0], values[:, 1])
    assert (measured.figure("box_iou")[:, 0, measured.boxed] > 0).any()


def test_rows_say_what_does_not_apply_and_the_metadata_what_was_compared(done, specs: dict[str, str]) -> None:
    measured, out, _ = done
    table = pq.read_table(out / "maps.parquet")
    facts = json.loads(table.schema.metadata[b"paml"])
    assert facts["schema_version"] == 1
    assert [entry["title"] for entry in facts["runs"]] == list(specs)
    assert [entry["alpha"] for entry in facts["runs"]] == [1, 5, 5]
    assert facts["reference"] == "AN"
    assert "half to even" in facts["convention"]
    rows = table.to_pylist()
    assert len(rows) == 2 * len(specs) * len(measured.cls)
    boxed = {key_of("test", number) for number in range(0, COUNTS["test"], 2)}
    for row in rows:
        own = row["run"] == "AN"
        assert (row["spearman"] is None) == (row["concordance"] is None) == own
        assert (row["control"] is None) == (not own)
        has_box = row["key"] in boxed and row["state"] == "positive"
        assert (row["pointing_hit"] is not None) == (row["box_iou"] is not None) == has_box
        assert row["mid"] in CLASSES
        assert row["map"] in KINDS


def test_summary_and_pictures_stand_beside_the_rows(done) -> None:
    _, out, said = done
    names = {path.name for path in out.iterdir()}
    pictures = {"likeness.png", "ends.png", "panel.png", "rejected.png"}
    assert names == {"maps.parquet", "summary.txt", "summary.csv", *pictures}
    for name in pictures:
        assert min(_size(out / name)) > 300
    text = (out / "summary.txt").read_text()
    assert "positive labels: 45 of 18 images" in text
    assert "pointing" in text
    assert "18 of 18 images of test, all of them" in said
    header, *lines = (out / "summary.csv").read_text().splitlines()
    assert header == "state,run,map,figure,labels,undefined,mean,q1,median,q3"
    assert any(line.startswith("positive,LL-R + BoostLU,boosted,concordance,45,0,") for line in lines)


def test_constant_maps_are_counted(prepared: Path, folders: dict[str, str], tmp_path: Path) -> None:
    flat = open_runs({"flat": folders["an"]})[0]
    with torch.no_grad():
        flat.model.head.weight.zero_()
    other = open_runs({"AN": folders["an"]})[0]
    split = open_split(flat.settings.data, "test", "labels/test.arrow", images="observed")
    loader = eval_loader(flat.settings, split, SIZE, World())
    measured = measure([other, flat], 0, loader, split)
    found = [row for row in summary(measured) if row["run"] == "flat" and row["figure"] == "spearman"]
    assert all(row["undefined"] == row["labels"] for row in found)
    assert all(math.isnan(row["median"]) for row in found)
    assert sum(row["labels"] for row in found) == 2 * len(measured.cls)


def test_a_sample_of_images_is_the_seeds_and_keeps_their_order(prepared: Path, tmp_path: Path) -> None:
    data = tiny_settings(prepared, tmp_path).data
    split = open_split(data, "test", "labels/test.arrow", images="observed")
    drawn = drawn_images(split, 5, 0).samples
    assert len(drawn) == 5
    assert (np.diff(drawn.index) > 0).all()
    np.testing.assert_array_equal(drawn.row, split.table.rows_of([split.manifest.key(at) for at in drawn.index]))
    np.testing.assert_array_equal(drawn.index, drawn_images(split, 5, 0).samples.index)
    assert drawn.index.tolist() != drawn_images(split, 5, 1).samples.index.tolist()
    assert len(drawn_images(split, 99, 0).samples) == COUNTS["test"]


def test_what_cannot_be_compared_is_refused(
    specs: dict[str, str], prepared: Path, tmp_path: Path, folders: dict[str, str]
) -> None:
    def refused(match: str, kind: type[PamlError] = SettingsError, **changes) -> None:
        with pytest.raises(kind, match=match):
            explain(ExplainSettings(**{"runs": specs, "out": str(tmp_path), **changes}), lambda line: None)

    small = {"epochs": 1, "loss": {"name": "an"}}
    sizes = _trained(prepared, tmp_path, "sizes", **small, data={"image_size": 48})
    stride = _trained(prepared, tmp_path, "stride", **small, model={"output_stride": 16})
    refused("two or more", runs={"AN": specs["AN"]})
    refused("reference is 'nobody'; runs names 'AN', 'AN", reference="nobody")
    refused("different sides in pixels .AN 32, B 48", runs={"AN": specs["AN"], "B": sizes})
    refused("maps differ in size .AN 4 × 4, B 2 × 2", runs={"AN": specs["AN"], "B": stride})
    refused("holds no run", DataError, runs={"AN": specs["AN"], "B": str(tmp_path / "none")})
    refused("no whole checkpoint yet", DataError, runs={"AN": specs["AN"], "B": _opened_empty(prepared, tmp_path)})
    refused("checkpoint 'step-000000999' is not in", runs=specs | {"B": specs["AN"] + "@step-000000999"})
    refused("labels/nowhere|shards/nowhere", DataError, split="nowhere")
    other = prepare_tiny(tmp_path / "other")
    _reversed_classes(other)
    refused("in another order", DataError, root=str(other))


def _opened_empty(prepared: Path, storage: Path) -> str:
    (storage / "empty").mkdir()
    return _opened(tiny_settings(prepared, storage, run={"name": "empty"}))


def _reversed_classes(root: Path) -> None:
    from paml.labels import table_from_triples

    keys = [key_of("test", number) for number in range(COUNTS["test"])]
    truth = np.stack([true_classes("test", number) for number in range(COUNTS["test"])])
    image, cls = np.nonzero(truth)
    path = root / "labels" / "test.arrow"
    path.unlink()
    table_from_triples(keys, list(reversed(CLASSES)), None, image, cls, np.full(len(cls), POSITIVE), str(path))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("runs/a", ("runs/a", "best", None)),
        ("runs/a/", ("runs/a", "best", None)),
        ("runs/a@newest", ("runs/a", "newest", None)),
        ("runs/a:alpha=5", ("runs/a", "best", 5.0)),
        ("s3://bucket/runs/a@step-000000012:alpha=2.5", ("s3://bucket/runs/a", "step-000000012", 2.5)),
        ("s3://me@bucket/a:b", ("s3://me@bucket/a:b", "best", None)),
    ],
)
def test_a_run_is_a_folder_a_checkpoint_and_an_alpha(spec: str, expected: tuple) -> None:
    assert parse_run(spec) == expected


@pytest.mark.parametrize("spec", ["runs/a:alpha=0.5", "runs/a:alpha=much", "runs/a:alpha=nan"])
def test_an_alpha_below_one_is_refused(spec: str) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        parse_run(spec)


def test_best_is_by_the_validation_of_the_alpha_that_was_scored(folders: dict[str, str]) -> None:
    names = committed(folders["an"])
    best = read_checkpoint(folders["an"], names[-1], groups=()).facts["best"]
    opened = open_runs({"1": folders["an"], "5": folders["an"] + ":alpha=5", "3": folders["an"] + ":alpha=3"})
    assert [run.checkpoint for run in opened] == [best[alpha]["checkpoint"] for alpha in ("1", "5", "1")]


def test_rejected_labels_are_drawn_with_the_probe_where_the_truth_is_unknown(tmp_path: Path) -> None:
    known = [{"epoch": 1, "rejection/rejected": 0.0, "rejection/precision": math.nan}]
    known.append({"epoch": 2, "rejection/rejected": 9.0, "rejection/precision": 0.5, "rejection/recall": 0.1})
    probed = [{"epoch": 1, "rejection/rejected": 5.0, "rejection/probe_recall": 0.2}]
    draw_rejected({"a": (0, known), "b": (1, probed)}, str(tmp_path / "rejected.png"))
    assert _size(tmp_path / "rejected.png")[0] > 1000
    with pytest.raises(ValueError, match="no run rejects"):
        draw_rejected({"AN": (0, [{"epoch": 1}])}, str(tmp_path / "none.png"))


def test_a_figure_applies_where_it_has_a_meaning(done) -> None:
    measured, _, _ = done
    assert set(Measured.FIGURES) >= {"spearman", "control", "pointing_hit"}
    assert measured.applies("control", 0).all()
    assert not measured.applies("control", 1).any()
    assert not measured.applies("spearman", 0).any()
    assert measured.applies("box_iou", 2).sum() == measured.boxed.sum() > 0
