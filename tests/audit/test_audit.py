"""The audit from a trained run to its files, and from verdicts back to a label table."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from paml.audit.audit import AuditSettings, audit
from paml.audit.evidence import open_checkpoints
from paml.audit.rank import fit_class_scale
from paml.audit.scoring import ScoredLabels, SplitScores
from paml.cli import main
from paml.errors import DataError, SettingsError
from paml.labels import POSITIVE, UNOBSERVED, LabelTable
from paml.models.backbones import IMAGENET_MEAN, IMAGENET_STD
from paml.models.cam import build_model
from paml.preparation.prepare import prepare
from paml.preparation.settings import PrepareSettings
from paml.settings import flatten
from paml.shards import Manifest, ShardSettings
from paml.training.checkpoint import list_checkpoints, read_checkpoint
from paml.training.data import eval_loader, open_split
from paml.training.settings import TrainSettings
from paml.training.world import World
from tests.helpers.jobs import write_scenes
from tests.helpers.prepared import CLASSES, SIZE, tiny_settings
from tests.helpers.runs import run

K = len(CLASSES)


def _trained(root: Path, storage: Path, name: str, **changes) -> tuple[str, TrainSettings]:
    settings = tiny_settings(root, storage, run={"name": name}, checkpoint={"keep": None}, **changes)
    assert run(settings) is not None
    folder = Path(settings.run.storage) / settings.run.name
    (folder / "run.json").write_text(json.dumps({"settings": flatten(settings)}))
    return str(folder), settings


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, TrainSettings]:
    return _trained(prepared, tmp_path_factory.mktemp("runs"), "cp", loss={"name": "ll-cp"}, epochs=3)


@pytest.fixture(scope="module")
def logits(trained: tuple[str, TrainSettings]) -> tuple[np.ndarray, np.ndarray]:
    """Logits float64 [C, N, K] of every epoch's checkpoint for the training images and their mirror images."""
    folder, settings = trained
    split = open_split(settings.data, "train", "labels/train.arrow", images="observed")
    batches = list(eval_loader(settings.data, split, SIZE, World(), batch_size=16))
    order = np.argsort(np.concatenate([batch.index for batch in batches]))  # batches are not in manifest order
    images = torch.cat([batch.images for batch in batches])[order] / 255.0
    images = (images - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    logits = []
    for name in list_checkpoints(folder):
        model = build_model(settings.model, K)
        model.load_state_dict(read_checkpoint(folder, name).tensors["weights"])
        with torch.no_grad():
            for view in (images, images.flip(2)):
                maps = model.eval().maps(view.permute(0, 3, 1, 2)).double()
                logits.append(torch.where(maps > 0, 5 * maps, maps).mean((2, 3)).numpy())
    stacked = np.stack(logits)
    return stacked[0::2], stacked[1::2]


def _states(table: LabelTable, manifest: Manifest) -> np.ndarray:
    states = np.full((len(manifest), K), UNOBSERVED, np.int8)
    labels = table.lookup(table.rows_of(manifest.keys()))
    states[labels.image, labels.cls] = labels.state
    return states


@pytest.fixture(scope="module")
def done(trained: tuple[str, TrainSettings], tmp_path_factory: pytest.TempPathFactory):
    out, lines = tmp_path_factory.mktemp("audit"), []
    issues = audit(
        AuditSettings(run=trained[0] + "@newest", missing=30, wrong=12, batch_size=7, out=str(out)), lines.append
    )
    return issues, out, lines


def test_issues_are_ranked_by_the_checkpoints_scores(done, trained, logits, prepared: Path) -> None:
    issues, out, _ = done
    plain, mirrored = logits
    scores = (plain[-1] + mirrored[-1]) / 2
    manifest = Manifest.open(prepared / "shards" / "train")
    states = _states(LabelTable.open(prepared / "labels" / "train.arrow"), manifest)
    image, cls = np.nonzero(states != UNOBSERVED)
    observed = ScoredLabels(image, cls.astype(np.int32), scores[image, cls].astype(np.float32), states[image, cls])
    scores_of_observed = SplitScores(0, K, None, observed)  # pyright: ignore[reportArgumentType]
    scale = fit_class_scale(scores_of_observed)
    distances = np.where(states == POSITIVE, -1, 1) * (scores - scale.boundary)
    normalized = np.where(states == UNOBSERVED, scores - scale.offset, distances)

    rows = pq.read_table(out / "issues.parquet").to_pylist()
    index_of = {manifest.key(n): n for n in range(len(manifest))}
    for kind, count in (("missing", 30), ("wrong", 12)):
        of_kind = [row for row in rows if row["kind"] == kind]
        assert [row["rank"] for row in of_kind] == list(range(1, count + 1))
        allowed = (states == UNOBSERVED) == (kind == "missing")
        best = np.sort(np.where(allowed, normalized, -np.inf).ravel())[::-1][:count]
        np.testing.assert_allclose([row["score"] for row in of_kind], best, atol=1e-4)
        for row in of_kind:
            n, k = index_of[row["key"]], CLASSES.index(row["mid"])
            assert row["score"] == pytest.approx(normalized[n, k], abs=1e-4)
            assert row["logit"] == pytest.approx(scores[n, k], abs=1e-4)
            assert row["probability"] == pytest.approx(1 / (1 + np.exp(-scores[n, k])), abs=1e-5)
            assert row["state"] == {POSITIVE: "positive", 0: "negative", UNOBSERVED: "unobserved"}[int(states[n, k])]
            np.testing.assert_allclose(row["logit_by_checkpoint"], plain[:, n, k], atol=1e-4)
    assert len(issues) == len(rows) == 42


def test_evidence_is_the_fraction_of_checkpoints_that_agree(done, trained) -> None:
    _, out, _ = done
    table = pq.read_table(out / "issues.parquet")
    rows, about = table.to_pylist(), json.loads(table.schema.metadata[b"paml"])
    assert about["checkpoints"] == list_checkpoints(trained[0])
    for row in rows:
        by_checkpoint = np.array(row["logit_by_checkpoint"], np.float32)
        sign = -1 if row["state"] == "positive" else 1
        offset = row["logit"] - sign * row["score"]
        lowest = min(other["score"] for other in rows if other["kind"] == row["kind"])
        assert row["agreement"] == pytest.approx((sign * (by_checkpoint - offset) >= lowest).mean())


def test_the_csv_has_the_open_images_format_and_the_page_has_the_images(done, prepared: Path) -> None:
    _, out, lines = done
    rows = pq.read_table(out / "issues.parquet").to_pylist()
    with open(out / "issues.csv", newline="") as file:
        cells = list(csv.reader(file))
    assert cells[0] == ["ImageID", "Source", "LabelName", "Confidence"]
    assert [(cell[0], cell[2]) for cell in cells[1:]] == [(row["key"], row["mid"]) for row in rows]
    np.testing.assert_allclose([float(cell[3]) for cell in cells[1:]], [row["probability"] for row in rows], atol=1e-6)
    page = (out / "page.html").read_text("utf-8")
    block = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert block is not None
    data = json.loads(block[1])
    assert [(issue["key"], issue["mid"], issue["rank"]) for issue in data["issues"]] == [
        (row["key"], row["mid"], row["rank"]) for row in rows
    ]
    assert len(data["thumbnails"]) == len({row["key"] for row in rows})  # one for all issues of an image
    assert any("page.html" in line for line in lines)


def test_settings_limit_the_issues(trained, tmp_path: Path) -> None:
    few = AuditSettings(
        run=trained[0],
        missing=9,
        wrong=0,
        max_per_class=2,
        checkpoints=1,
        mirror=False,
        images="all",
        out=str(tmp_path),
    )
    issues = audit(few, lambda line: None)
    assert len(issues) == 9
    assert np.bincount(issues.cls).max() <= 2
    assert len(pq.read_table(tmp_path / "issues.parquet")["logit_by_checkpoint"][0]) == 1


def test_issues_do_not_depend_on_batch_size_and_number_of_issues(done, trained, tmp_path: Path) -> None:
    again = audit(
        AuditSettings(run=trained[0] + "@newest", missing=10, wrong=3, batch_size=32, out=str(tmp_path)),
        lambda line: None,
    )
    first = done[0]
    for kind, count in (("missing", 10), ("wrong", 3)):
        fewer, more = again.kind == kind, first.kind == kind
        np.testing.assert_allclose(again.score[fewer], first.score[more][:count], atol=1e-5)


def test_a_run_trained_from_a_layer_scores_as_its_whole_network(prepared: Path, tmp_path: Path) -> None:
    folder, settings = _trained(
        prepared,
        tmp_path,
        "front",
        model={"train_from": "stage3"},
        data={"features_dir": str(tmp_path / "f")},
        epochs=1,
    )
    (run,) = open_checkpoints(folder)
    split = open_split(settings.data, "train", "labels/train.arrow", images="observed")
    images = next(iter(eval_loader(settings.data, split, SIZE, World(), batch_size=16))).images
    model = build_model(settings.model, K)
    model.load_state_dict(run.model.state_dict())
    pixels = (images / 255.0 - torch.tensor(model.info.mean)) / torch.tensor(model.info.std)
    with torch.no_grad():
        expected = model.eval().maps(pixels.permute(0, 3, 1, 2))
    torch.testing.assert_close(run.maps(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing": -1}, "missing is -1"),
        ({"missing": 0, "wrong": 0}, "missing and wrong are 0"),
        ({"checkpoints": 0}, "checkpoints is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"run": "a:alpha=0.5"}, "at least 1"),
        ({"images": "some"}, "'some'"),
    ],
)
def test_invalid_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AuditSettings(**changes)


def test_inputs_that_cannot_be_audited_are_refused(trained, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"run\.json"):
        audit(AuditSettings(run=str(tmp_path), out=str(tmp_path / "out")), lambda line: None)
    with pytest.raises(DataError, match="other"):
        audit(AuditSettings(run=trained[0], split="other", out=str(tmp_path / "out")), lambda line: None)
    with pytest.raises(SettingsError, match="step-000000999"):
        audit(AuditSettings(run=trained[0] + "@step-000000999", out=str(tmp_path / "out")), lambda line: None)


def test_the_command_takes_a_config_and_fails_with_one_message(
    trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_command(*options: object) -> tuple[int, str]:
        try:
            status = main(["audit", *map(str, options)])
        except SystemExit as stop:
            status = int(stop.code or 0)
        output = "".join(capsys.readouterr())
        assert "Traceback" not in output
        return status, output

    config, out = tmp_path / "audit.yaml", tmp_path / "out"
    config.write_text(f"run: {trained[0]}\nmissing: 4\nwrong: 2\nout: {out}\n")
    status, output = run_command("--config", config, "--missing", 5)
    assert (status, f"to {out}" in output) == (0, True)
    assert len(pq.read_table(out / "issues.parquet")) == 7
    status, output = run_command("--run", tmp_path / "none", "--out", out)
    assert status == 1
    assert str(tmp_path / "none") in output
    status, output = run_command("--missing", "many")
    assert status == 2


def test_verdicts_become_a_new_version_of_the_prepared_tables(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=30, others=8)
    shutil.copytree(scenes / "2017_11", scenes / "full")
    options = {
        "out": str(tmp_path / "data"),
        "labels": str(scenes / "2017_11"),
        "images": str(scenes / "images"),
        "full_labels": str(scenes / "full"),
        "protocol": "single-positive",
        "protocol_seed": 3,
        "splits": ("train",),
        "shards": ShardSettings(size=32, samples_per_shard=15),
        "workers": 1,
    }
    prepare(PrepareSettings(**options), lambda line: None)
    labels = tmp_path / "data" / "labels"
    old = {name: LabelTable.open(labels / f"{name}.arrow") for name in ("train", "train-single")}
    digests = {name: table.digest for name, table in old.items()}
    single = old["train-single"].lookup([0])
    key, mid = old["train-single"].keys([0])[0], old["train-single"].classes[int(single.cls[0])]
    other = old["train-single"].classes[(int(single.cls[0]) + 1) % old["train-single"].num_classes]
    verdicts = tmp_path / "annotations-human.csv"
    verdicts.write_text(
        f"ImageID,Source,LabelName,Confidence\n{key},verification,{mid},0\n{key},verification,{other},1\n"
    )
    lines: list[str] = []
    prepare(PrepareSettings(**options, verdicts=(str(verdicts),)), lines.append)
    for name, digest in digests.items():
        assert LabelTable.open(labels / f"{name}.arrow").digest == digest
        new = LabelTable.open(labels / f"{name}-audited.arrow")
        assert new.metadata["verdicts_on"] == digest
        row = new.lookup(new.rows_of([key]))
        states = {new.classes[k]: s for k, s in zip(row.cls.tolist(), row.state.tolist(), strict=True)}
        assert (states[mid], states[other]) == (0, 1)
    assert any("1 overturned" in line for line in lines)
    with pytest.raises(SettingsError, match="verdicts_split is 'test'"):
        PrepareSettings(**options, verdicts=(str(verdicts),), verdicts_split="test")
