"""The audit from a trained run to its files, and from a person's answers back to a label table."""

import csv
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from paml.audit.audit import AuditSettings, audit, open_auditor
from paml.audit.rank import scale_of
from paml.audit.scoring import Observed, Scored, bin_of, least_rejected_bin
from paml.errors import DataError, SettingsError
from paml.labels import POSITIVE, UNOBSERVED, LabelTable
from paml.losses import reject_rate
from paml.models.cam import build_model
from paml.prepare import PrepareSettings, prepare
from paml.shards import Manifest, ShardSettings
from paml.training.checkpoint import committed, read_checkpoint
from paml.training.data import eval_loader, open_split
from paml.training.settings import TrainSettings, flatten
from paml.training.world import World
from tests.helpers.jobs import ROOT, write_scenes
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
    """float64 [C, N, K] of every epoch's checkpoint on the training pictures, and of the mirrored ones, by hand."""
    folder, settings = trained
    split = open_split(settings.data, "train", "labels/train.arrow", images="observed")
    batches = list(eval_loader(settings, split, SIZE, World()))
    order = np.argsort(
        np.concatenate([batch.index for batch in batches])
    )  # batches do not come in the manifest's order
    pictures = torch.cat([batch.images for batch in batches])[order] / 255.0
    pictures = (pictures - torch.tensor(settings.model.pixel_mean)) / torch.tensor(settings.model.pixel_std)
    found = []
    for name in committed(folder):
        model = build_model(settings.model, K)
        model.load_state_dict(read_checkpoint(folder, name).tensors["weights"])
        with torch.no_grad():
            for view in (pictures, pictures.flip(2)):
                maps = model.eval().maps(view.permute(0, 3, 1, 2)).double()
                found.append(torch.where(maps > 0, 5 * maps, maps).mean((2, 3)).numpy())
    stacked = np.stack(found)
    return stacked[0::2], stacked[1::2]


def _states(table: LabelTable, manifest: Manifest) -> np.ndarray:
    found = np.full((len(manifest), K), UNOBSERVED, np.int8)
    labels = table.lookup(table.rows_of(manifest.keys()))
    found[labels.image, labels.cls] = labels.state
    return found


@pytest.fixture(scope="module")
def done(trained: tuple[str, TrainSettings], tmp_path_factory: pytest.TempPathFactory):
    out, said = tmp_path_factory.mktemp("audit"), []
    finds = audit(
        AuditSettings(run=trained[0] + "@newest", finds=30, observed_finds=12, batch_size=7, out=str(out)), said.append
    )
    return finds, out, said


def test_finds_are_those_of_the_checkpoint_s_scores_by_hand(done, trained, logits, prepared: Path) -> None:
    finds, out, _ = done
    plain, mirrored = logits
    scores = (plain[-1] + mirrored[-1]) / 2
    manifest = Manifest.open(prepared / "shards" / "train")
    states = _states(LabelTable.open(prepared / "labels" / "train.arrow"), manifest)
    image, cls = np.nonzero(states != UNOBSERVED)
    observed = Observed(
        image, cls.astype(np.int32), states[image, cls] == POSITIVE, scores[image, cls].astype(np.float32)
    )
    nothing = Scored(0, K, None, observed, np.empty(0))  # pyright: ignore[reportArgumentType]
    scale = scale_of(nothing)
    sides = np.where(states == POSITIVE, -1, 1) * (scores - scale.border)
    normalised = np.where(states == UNOBSERVED, scores - scale.offset, sides)

    rows = pq.read_table(out / "finds.parquet").to_pylist()
    place = {manifest.key(n): n for n in range(len(manifest))}
    for kind, count in (("unobserved-positive", 30), ("observed-wrong", 12)):
        own = [row for row in rows if row["kind"] == kind]
        assert [row["rank"] for row in own] == list(range(1, count + 1))
        allowed = (states == UNOBSERVED) == (kind == "unobserved-positive")
        best = np.sort(np.where(allowed, normalised, -np.inf).ravel())[::-1][:count]
        np.testing.assert_allclose([row["score"] for row in own], best, atol=1e-4)
        for row in own:
            n, k = place[row["key"]], CLASSES.index(row["mid"])
            assert row["score"] == pytest.approx(normalised[n, k], abs=1e-4)
            assert row["logit"] == pytest.approx(scores[n, k], abs=1e-4)
            assert row["probability"] == pytest.approx(1 / (1 + np.exp(-scores[n, k])), abs=1e-5)
            assert row["state"] == {POSITIVE: "positive", 0: "negative", UNOBSERVED: "unobserved"}[int(states[n, k])]
            np.testing.assert_allclose(row["logit_by_checkpoint"], plain[:, n, k], atol=1e-4)
    assert len(finds) == len(rows) == 42


def test_evidence_is_what_its_columns_say(done, trained, logits, prepared: Path) -> None:
    _, out, _ = done
    folder, settings = trained
    table = pq.read_table(out / "finds.parquet")
    rows, about = table.to_pylist(), json.loads(table.schema.metadata[b"paml"])
    assert about["checkpoints"] == committed(folder)
    manifest = Manifest.open(prepared / "shards" / "train")
    states = _states(LabelTable.open(prepared / "labels" / "train.arrow"), manifest)
    thresholds = []
    for epoch, own in enumerate(logits[0], start=1):
        histogram = np.bincount(bin_of(own[states == UNOBSERVED].astype(np.float32)), minlength=1 << 16)
        thresholds.append(least_rejected_bin(histogram, float(reject_rate(settings.loss, epoch))))
    overlay = read_checkpoint(folder, committed(folder)[-1]).tensors["progress"]["overlay"].numpy().tolist()
    assert overlay  # LL-Cp has corrected some
    place = {manifest.key(n): n for n in range(len(manifest))}
    for row in rows:
        by = np.array(row["logit_by_checkpoint"], np.float32)
        # A threshold may lie one bin off, where rounding moves a score over a bin's edge.
        sure, most = (int((bin_of(by) >= np.array(thresholds) + off).sum()) for off in (1, -1))
        assert sure <= row["rejected_in"] <= most if row["state"] == "unobserved" else row["rejected_in"] == 0
        assert row["corrected"] == (place[row["key"]] * K + CLASSES.index(row["mid"]) in overlay)
        sign = -1 if row["state"] == "positive" else 1
        offset = row["logit"] - sign * row["score"]
        least = min(other["score"] for other in rows if other["kind"] == row["kind"])
        assert row["agreement"] == pytest.approx((sign * (by - offset) >= least).mean())
    assert any(row["corrected"] for row in rows)
    assert any(row["rejected_in"] for row in rows)


def test_the_csv_has_the_form_of_open_images_and_the_page_shows_the_stored_pictures(done, prepared: Path) -> None:
    _, out, said = done
    rows = pq.read_table(out / "finds.parquet").to_pylist()
    with open(out / "finds.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["ImageID", "Source", "LabelName", "Confidence"]
    assert [(line[0], line[2]) for line in lines[1:]] == [(row["key"], row["mid"]) for row in rows]
    np.testing.assert_allclose([float(line[3]) for line in lines[1:]], [row["probability"] for row in rows], atol=1e-6)
    page = (out / "page.html").read_text("utf-8")
    found = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    assert [(find["key"], find["mid"], find["rank"]) for find in data["finds"]] == [
        (row["key"], row["mid"], row["rank"]) for row in rows
    ]
    assert len(data["pictures"]) == len({row["key"] for row in rows})  # once for all finds of an image
    assert any("page.html" in line for line in said)


def test_settings_bound_the_finds(trained, tmp_path: Path) -> None:
    few = AuditSettings(
        run=trained[0],
        finds=9,
        observed_finds=0,
        most_per_class=2,
        checkpoints=1,
        mirror=False,
        images="all",
        out=str(tmp_path),
    )
    finds = audit(few, lambda line: None)
    assert len(finds) == 9
    assert np.bincount(finds.cls).max() <= 2
    assert len(pq.read_table(tmp_path / "finds.parquet")["logit_by_checkpoint"][0]) == 1


def test_finds_do_not_depend_on_the_batches_nor_on_the_finds_asked_for(done, trained, tmp_path: Path) -> None:
    again = audit(
        AuditSettings(run=trained[0] + "@newest", finds=10, observed_finds=3, batch_size=32, out=str(tmp_path)),
        lambda line: None,
    )
    first = done[0]
    for kind, count in (("unobserved-positive", 10), ("observed-wrong", 3)):
        own, whole = again.kind == kind, first.kind == kind
        np.testing.assert_allclose(again.score[own], first.score[whole][:count], atol=1e-5)


def test_a_run_trained_from_a_layer_scores_as_its_whole_network(prepared: Path, tmp_path: Path) -> None:
    folder, settings = _trained(
        prepared,
        tmp_path,
        "front",
        model={"train_from": "stage3"},
        data={"features_dir": str(tmp_path / "f")},
        epochs=1,
    )
    auditor = open_auditor(folder)
    assert auditor.models[0].on_features
    split = open_split(settings.data, "train", "labels/train.arrow", images="observed")
    batch = next(iter(eval_loader(settings, split, SIZE, World())))
    with torch.inference_mode():
        for view, images in zip(auditor.views(True), (batch.images, batch.images.flip(2)), strict=True):
            maps = auditor.models[0].maps(view(batch))
            model = build_model(settings.model, K)
            model.load_state_dict(auditor.models[0].state_dict())
            pixels = (images / 255.0 - torch.tensor(settings.model.pixel_mean)) / 0.25
            torch.testing.assert_close(maps, model.eval().maps(pixels.permute(0, 3, 1, 2)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finds": -1}, "finds is -1"),
        ({"finds": 0, "observed_finds": 0}, "nothing to find"),
        ({"checkpoints": 0}, "checkpoints is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"run": "a:alpha=0.5"}, "at least 1"),
        ({"images": "some"}, "observed, positive or all"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AuditSettings(**changes)


def test_what_cannot_be_audited_is_said(trained, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        audit(AuditSettings(run=str(tmp_path), out=str(tmp_path / "out")), lambda line: None)
    with pytest.raises(DataError, match="not there"):
        audit(AuditSettings(run=trained[0], split="other", out=str(tmp_path / "out")), lambda line: None)
    with pytest.raises(SettingsError, match="is not in"):
        audit(AuditSettings(run=trained[0] + "@step-000000999", out=str(tmp_path / "out")), lambda line: None)


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs jobs/audit_labels.py in this process: its exit status and what it said."""
    spec = importlib.util.spec_from_file_location("audit_labels", ROOT / "jobs" / "audit_labels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run_job(*options: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["jobs/audit_labels.py", *map(str, options)])
        try:
            status = module.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        said = "".join(capsys.readouterr())
        assert "Traceback" not in said
        return status, said

    return run_job


def test_the_job_takes_a_config_and_fails_with_one_message(job, trained, tmp_path: Path) -> None:
    status, said = job("--help")
    assert status == 0
    assert "--observed_finds" in said
    config = tmp_path / "audit.yaml"
    config.write_text(f"run: {trained[0]}\nfinds: 4\nobserved_finds: 2\nout: {tmp_path / 'out'}\n")
    status, said = job("--config", config, "--finds", 5)
    assert (status, "in " + str(tmp_path / "out") in said) == (0, True)
    assert len(pq.read_table(tmp_path / "out" / "finds.parquet")) == 7
    status, said = job("--run", tmp_path / "none", "--out", tmp_path / "out")
    assert status == 1
    assert "holds no run" in said
    status, said = job("--finds", "many")
    assert status == 2


def test_verdicts_become_a_new_version_of_the_prepared_tables(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "scenes", train=30, others=8)
    shutil.copytree(scenes / "2017_11", scenes / "full")
    given = {
        "out": str(tmp_path / "data"),
        "release": str(scenes / "2017_11"),
        "images": str(scenes / "images"),
        "full_labels": str(scenes / "full"),
        "single_positive_seed": 3,
        "splits": ("train",),
        "shards": ShardSettings(size=32, samples_per_shard=15),
        "workers": 1,
    }
    prepare(PrepareSettings(**given), lambda line: None)
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
    said: list[str] = []
    prepare(PrepareSettings(**given, verdicts=(str(verdicts),)), said.append)
    for name, digest in digests.items():
        assert LabelTable.open(labels / f"{name}.arrow").digest == digest
        new = LabelTable.open(labels / f"{name}-audited.arrow")
        assert new.metadata["verdicts_on"] == digest
        row = new.lookup(new.rows_of([key]))
        found = {new.classes[k]: s for k, s in zip(row.cls.tolist(), row.state.tolist(), strict=True)}
        assert (found[mid], found[other]) == (0, 1)
    assert any("1 overturned" in line for line in said)
    with pytest.raises(SettingsError, match="verdicts_split is 'test'"):
        PrepareSettings(**given, verdicts=(str(verdicts),), verdicts_split="test")
