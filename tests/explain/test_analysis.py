"""The analysis of maps between runs: metrics, files and refused inputs."""

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
from paml.explain.analysis import ExplainSettings, compute_metrics, draw_run_comparison, explain, sample_images
from paml.explain.boxes import read_boxes
from paml.explain.plots import draw_rejected
from paml.explain.report import MAP_KINDS, METRICS, MapMetrics, summary_text
from paml.labels import POSITIVE
from paml.models.cam import build_model
from paml.runs.spec import OpenRun, open_runs, parse_run
from paml.settings import flatten
from paml.shards.manifest import Manifest
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.data import eval_loader, open_split
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.prepared import CLASSES, COUNTS, SIZE, key_of, prepare_tiny, tiny_settings, true_classes
from tests.helpers.runs import run

SHIFT = 0.45


def _trained(root: Path, storage: Path, name: str, **changes) -> str:
    settings = tiny_settings(root, storage, run={"name": name}, checkpoint={"keep": None}, **changes)
    assert run(settings) is not None
    return _opened(settings)


def _opened(settings: TrainSettings) -> str:
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return str(folder)


def _image_size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
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
    """The true boxes of every other image of the tiny data set."""
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
    out, lines = tmp_path_factory.mktemp("out"), []
    settings = ExplainSettings(runs=specs, boxes=str(boxes), examples=2, batch_size=5, out=str(out))
    return explain(settings, lines.append), out, lines


def test_every_label_of_the_split_is_measured_once_for_any_batch_size(done, prepared: Path) -> None:
    metrics, _, _ = done
    assert len(metrics.cls) == COUNTS["test"] * len(CLASSES)
    assert len(np.unique(metrics.index * len(CLASSES) + metrics.cls)) == len(metrics.cls)
    manifest = Manifest.open(prepared / "shards" / "test")
    for index in range(COUNTS["test"]):
        of_image = metrics.index == index
        truth = true_classes("test", int(manifest.key(index)[2:], 16))
        np.testing.assert_array_equal(metrics.state[of_image] == POSITIVE, truth[metrics.cls[of_image]])


@pytest.fixture(scope="module")
def shifted(specs: dict[str, str], boxes: Path) -> tuple[list[OpenRun], MapMetrics]:
    """The runs with SHIFT added to every score: after so little training all scores are negative."""
    runs = open_runs(specs)
    for model in {id(opened.model): opened.model for opened in runs}.values():
        with torch.no_grad():
            model.head.bias += SHIFT
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    read = read_boxes(str(boxes), [split.manifest.key(index) for index in range(COUNTS["test"])], CLASSES)
    loader = eval_loader(runs[0].settings.data, split, SIZE, World(), batch_size=16)
    return runs, compute_metrics(runs, loader, split, read.by_label, size=SIZE)


def test_metrics_are_those_of_the_checkpoints_maps(shifted: tuple[list[OpenRun], MapMetrics]) -> None:
    runs, metrics = shifted
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    (batch,) = eval_loader(runs[0].settings.data, split, SIZE, World(), batch_size=32)
    reference, positive = None, 0
    for position, opened in enumerate(runs):
        model = build_model(opened.settings.model, len(CLASSES))
        model.load_state_dict(read_checkpoint(opened.folder, opened.checkpoint).tensors["weights"])
        with torch.no_grad():
            images = (batch.images / 255.0 - torch.tensor(model.info.mean)) / torch.tensor(model.info.std)
            raw = model.eval().maps(images.permute(0, 3, 1, 2)).double().numpy() + SHIFT
        reference = raw if reference is None else reference
        for label in (3, 100, 171):
            image, cls = metrics.index[label], metrics.cls[label]
            scores, other = raw[image, cls], reference[image, cls]
            positive += int((scores > 0).sum())
            for kind, alpha in ((0, 1.0), (1, opened.alpha)):
                values = dict(zip(METRICS, metrics.values[position, kind, :, label], strict=True))
                boosted = np.where(scores > 0, alpha * scores, scores)
                assert values["logit"] == pytest.approx(boosted.mean(), abs=1e-4)
                assert values["top"] == pytest.approx(boosted.max(), abs=1e-4)
                assert values["bottom"] == pytest.approx(boosted.min(), abs=1e-4)
                if position == 0:  # the reference, whose alpha is 1
                    assert math.isnan(values["spearman"])
                    continue
                assert values["mean_absolute_difference"] == pytest.approx(np.abs(boosted - other).mean(), abs=1e-4)
                expected = stats.spearmanr(scores.ravel(), other.ravel()).statistic
                assert values["spearman"] == pytest.approx(expected, abs=1e-2)  # rounding swaps close scores
    assert positive > 10


def test_a_checkpoint_with_another_alpha_has_the_same_raw_maps(shifted, specs: dict[str, str]) -> None:
    opened = open_runs(specs | {"AN, newest": specs["AN"] + "@newest"})
    assert opened[3].model is opened[1].model
    assert [run.alpha for run in opened] == [1, 5, 5, 1]
    _, metrics = shifted
    raw, boosted = metrics.metric("top")[1]
    assert (boosted >= raw).all()
    assert (boosted > raw).any()
    np.testing.assert_array_equal(*metrics.metric("top")[0])


def test_a_comparison_of_runs_shows_the_labels_that_improved_most(shifted, tmp_path: Path) -> None:
    runs, _ = shifted
    split = open_split(runs[0].settings.data, "test", "labels/test.arrow", images="observed")
    draw_run_comparison(runs, split, str(tmp_path / "runs.png"), examples=2)
    with Image.open(tmp_path / "runs.png") as figure:
        assert figure.size[1] > 500


def test_box_metrics_apply_to_labels_with_boxes_and_ignore_boost(shifted) -> None:
    _, metrics = shifted
    assert metrics.has_box.sum() == sum(true_classes("test", number).sum() for number in range(0, COUNTS["test"], 2))
    for name in ("pointing_hit", "box_iou"):
        values = metrics.metric(name)
        assert (np.isnan(values) == ~metrics.has_box).all()
        np.testing.assert_array_equal(values[:, 0], values[:, 1])
    assert (metrics.metric("box_iou")[:, 0, metrics.has_box] > 0).any()


def test_parquet_rows_have_nulls_where_a_metric_does_not_apply(done, specs: dict[str, str]) -> None:
    metrics, out, _ = done
    table = pq.read_table(out / "maps.parquet")
    metadata = json.loads(table.schema.metadata[b"paml"])
    assert metadata["schema_version"] == 1
    assert [entry["title"] for entry in metadata["runs"]] == list(specs)
    assert [entry["alpha"] for entry in metadata["runs"]] == [1, 5, 5]
    assert metadata["reference"] == "AN"
    assert "half to even" in metadata["convention"]
    rows = table.to_pylist()
    assert len(rows) == 2 * len(specs) * len(metrics.cls)
    with_box = {key_of("test", number) for number in range(0, COUNTS["test"], 2)}
    for row in rows:
        is_reference = row["run"] == "AN"
        assert (row["spearman"] is None) == (row["concordance"] is None) == is_reference
        assert (row["control"] is None) == (not is_reference)
        has_box = row["key"] in with_box and row["state"] == "positive"
        assert (row["pointing_hit"] is not None) == (row["box_iou"] is not None) == has_box
        assert row["mid"] in CLASSES
        assert row["map"] in MAP_KINDS


def test_summary_and_plots_are_written(done) -> None:
    _, out, lines = done
    names = {path.name for path in out.iterdir()}
    plots = {"similarity.png", "extremes.png", "panel.png", "rejected.png"}
    assert names == {"maps.parquet", "summary.txt", *plots}
    for name in plots:
        assert min(_image_size(out / name)) > 300
    text = (out / "summary.txt").read_text()
    assert "45 positive labels in 18 images" in text
    assert "pointing" in text
    assert "18 of 18 images of test (all)" in lines


def test_constant_maps_are_counted_as_undefined(prepared: Path, folders: dict[str, str], tmp_path: Path) -> None:
    flat = open_runs({"flat": folders["an"]})[0]
    with torch.no_grad():
        flat.model.head.weight.zero_()
    other = open_runs({"AN": folders["an"]})[0]
    split = open_split(flat.settings.data, "test", "labels/test.arrow", images="observed")
    loader = eval_loader(flat.settings.data, split, SIZE, World(), batch_size=16)
    metrics = compute_metrics([other, flat], loader, split)
    assert np.isnan(metrics.metric("spearman")[1]).all()
    rows = [line.split() for line in summary_text(metrics).splitlines() if line.startswith("flat")]
    assert all("nan [nan, nan]" in " ".join(row) for row in rows)
    assert sum(int(row[-1]) for row in rows) == len(metrics.cls)  # the column of undefined ones


def test_an_image_sample_depends_on_the_seed_and_keeps_manifest_order(prepared: Path, tmp_path: Path) -> None:
    data = tiny_settings(prepared, tmp_path).data
    split = open_split(data, "test", "labels/test.arrow", images="observed")
    samples = sample_images(split, 5, 0).samples
    assert len(samples) == 5
    assert (np.diff(samples.index) > 0).all()
    np.testing.assert_array_equal(samples.row, split.table.rows_of([split.manifest.key(i) for i in samples.index]))
    np.testing.assert_array_equal(samples.index, sample_images(split, 5, 0).samples.index)
    assert samples.index.tolist() != sample_images(split, 5, 1).samples.index.tolist()
    assert len(sample_images(split, 99, 0).samples) == COUNTS["test"]


def test_runs_that_cannot_be_compared_are_refused(
    specs: dict[str, str], prepared: Path, tmp_path: Path, folders: dict[str, str]
) -> None:
    def refused(match: str, kind: type[PamlError] = SettingsError, **changes) -> None:
        with pytest.raises(kind, match=match):
            explain(ExplainSettings(**{"runs": specs, "out": str(tmp_path), **changes}), lambda line: None)

    small = {"epochs": 1, "loss": {"name": "an"}}
    sizes = _trained(prepared, tmp_path, "sizes", **small, data={"image_size": 48})
    stride = _trained(prepared, tmp_path, "stride", **small, model={"output_stride": 16})
    refused("two or more", runs={"AN": specs["AN"]})
    refused("AN 32 px, B 48 px", runs={"AN": specs["AN"], "B": sizes})
    refused("AN 4 × 4 cells, B 2 × 2 cells", runs={"AN": specs["AN"], "B": stride})
    refused("none", DataError, runs={"AN": specs["AN"], "B": str(tmp_path / "none")})
    refused("checkpoint", DataError, runs={"AN": specs["AN"], "B": _opened_empty(prepared, tmp_path)})
    refused("'step-000000999'", runs=specs | {"B": specs["AN"] + "@step-000000999"})
    refused("labels/nowhere|shards/nowhere", DataError, split="nowhere")
    other = prepare_tiny(tmp_path / "other")
    _reversed_classes(other)
    refused("order", DataError, root=str(other))


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
def test_a_run_spec_has_a_folder_a_checkpoint_and_an_alpha(spec: str, expected: tuple) -> None:
    assert parse_run(spec) == expected


@pytest.mark.parametrize("spec", ["runs/a:alpha=0.5", "runs/a:alpha=much", "runs/a:alpha=nan"])
def test_an_alpha_below_one_is_refused(spec: str) -> None:
    with pytest.raises(SettingsError, match="at least 1"):
        parse_run(spec)


def test_best_is_chosen_by_validation_with_the_given_alpha(folders: dict[str, str]) -> None:
    names = list_checkpoints(folders["an"])
    best = read_checkpoint(folders["an"], names[-1], groups=()).facts["best"]
    opened = open_runs({"1": folders["an"], "5": folders["an"] + ":alpha=5", "3": folders["an"] + ":alpha=3"})
    assert [run.checkpoint for run in opened] == [best[alpha]["checkpoint"] for alpha in ("1", "5", "1")]


def test_rejections_are_drawn_with_the_probe_if_the_truth_is_unknown(tmp_path: Path) -> None:
    known = [{"epoch": 1, "rejection/rejected": 0.0, "rejection/precision": math.nan}]
    known.append({"epoch": 2, "rejection/rejected": 9.0, "rejection/precision": 0.5, "rejection/recall": 0.1})
    probed = [{"epoch": 1, "rejection/rejected": 5.0, "rejection/probe_recall": 0.2}]
    assert draw_rejected({"a": (0, known), "b": (1, probed)}, str(tmp_path / "rejected.png"))
    assert _image_size(tmp_path / "rejected.png")[0] > 1000
    assert not draw_rejected({"AN": (0, [{"epoch": 1}])}, str(tmp_path / "none.png"))


def test_each_metric_applies_to_the_runs_and_labels_it_is_defined_for(done) -> None:
    metrics, _, _ = done
    assert metrics.applies("control", 0).all()
    assert not metrics.applies("control", 1).any()
    assert not metrics.applies("spearman", 0).any()
    assert metrics.applies("box_iou", 2).sum() == metrics.has_box.sum() > 0
