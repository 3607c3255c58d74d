"""A search as people start it: rung by rung, on the validation split alone."""

import math

from paml import storage
from paml.compare.grid import grid_folder, slug
from paml.compare.halving import Candidate, Rung, best_of, candidates, history_of, recipe_of, rungs
from paml.compare.settings import SearchSettings
from paml.distributed import cluster
from paml.distributed.compare_run import tracked
from paml.distributed.grid_run import AGAIN, check_trainings, join_cluster, train_all
from paml.tracking import Journal
from paml.tracking.journal import CHARTS_LINK
from paml.training.loop import run_folder_of

NAME = "search"


def run_search(settings: SearchSettings) -> int:
    """Train the rungs that are not trained yet, and write one recipe for each method: `search/{method}.yaml`.

    The test split is never opened: train the recipes to score it. Returns 0, or 1 where a training failed (it drops
    out). Raises SettingsError or DataError before anything is trained; a stop exits with 128 + signal, and the same
    command goes on.
    """
    base = cluster.base_folder()
    methods = candidates(settings, base)
    everyone = [each for own in methods.values() for each in own]
    check_trainings([each.training for each in everyone])
    join_cluster([each.training for each in everyone], settings)
    folder = grid_folder(settings, NAME, base)
    print(f"{len(everyone)} configurations of {len(methods)} methods, in {folder}", flush=True)

    def work(journal: Journal, parent: str | None) -> int:
        tags = {"mlflow.parentRunId": parent} if parent else {}
        return _work(settings, methods, tags, journal, folder)

    what = f"{len(everyone)} configurations of {', '.join(methods)}"
    note = f"Successive halving of {what} on the validation split. {CHARTS_LINK}"
    return tracked(settings, NAME, folder, note, [run_folder_of(each.training.settings) for each in everyone], work)


def _work(
    settings: SearchSettings, methods: dict[str, list[Candidate]], tags: dict[str, str], journal: Journal, folder: str
) -> int:
    ladders = {}
    for method, own in methods.items():
        one = own[0].training.settings  # all of a method have as many epochs
        ladders[method] = rungs(len(own), one.epochs, settings.first_epochs, settings.eta, one.linear_init.epochs)
    alive, failed = dict(methods), dict[str, str]()
    reports: dict[str, list[str]] = {method: [] for method in methods}
    for place in range(max(map(len, ladders.values()))):
        climbing = {method: ladder[place] for method, ladder in ladders.items() if place < len(ladder)}
        failed |= _train_rung(settings, alive, climbing, tags)
        for method, rung in climbing.items():
            ranked = sorted(
                ((*best_of(history_of(each), rung.epochs), each) for each in alive[method] if not _dead(each, failed)),
                key=lambda one: -one[0],
            )
            reports[method] += [
                f"epoch {rung.epochs}: val mAP {100 * value:.2f} (epoch {epoch})  {_said(each)}"
                for value, epoch, each in ranked
            ]
            alive[method] = [each for _, _, each in ranked[: rung.kept]]
            for value, _, each in ranked:
                if not math.isnan(value):
                    journal.metrics({f"val_map/{each.training.name}"[:250]: value}, rung.epochs)
    for method, left in alive.items():
        text = "\n".join([method, *(f"  {line}" for line in reports[method])])
        print(f"\n{text}", flush=True)
        journal.artifact_bytes(text.encode(), f"rungs/{slug(method)}.txt")
        if left:
            _write_recipe(settings, method, left[0], len(methods[method]), journal, folder)
    for name, error in failed.items():
        print(f"{name} FAILED: {error}; {AGAIN} with it", flush=True)
    return 1 if failed else 0


def _dead(candidate: Candidate, failed: dict[str, str]) -> bool:
    return candidate.training.name in failed


def _said(candidate: Candidate) -> str:
    return ", ".join(f"{name} {value}" for name, value in candidate.values.items()) or "as the method is given"


def _train_rung(
    settings: SearchSettings, alive: dict[str, list[Candidate]], climbing: dict[str, Rung], tags: dict[str, str]
) -> dict[str, str]:
    """Bring all candidates of a rung to its epoch; methods of one goal are trained side by side."""
    failed: dict[str, str] = {}
    for epochs in sorted({rung.epochs for rung in climbing.values()}):
        there = [each for method, rung in climbing.items() if rung.epochs == epochs for each in alive[method]]
        due = [each.training for each in there if len(history_of(each)) < epochs]
        if due:
            print(f"to epoch {epochs}: {len(there)} configurations", flush=True)
            failed |= train_all(due, settings, done=len(there) - len(due), tags=tags, last_epoch=epochs)
    return failed


def _write_recipe(
    settings: SearchSettings, method: str, winner: Candidate, tried: int, journal: Journal, folder: str
) -> None:
    value, epoch = best_of(history_of(winner), winner.training.settings.all_epochs)
    path = storage.join(folder, f"{slug(method)}.yaml")
    opening = [
        f"python jobs/train_openimages.py --config {path}",
        f"{method}, the best of {tried} configurations by successive halving on the validation split:",
        f"val mAP {100 * value:.2f} in epoch {epoch} with {_said(winner)}.",
        "The test split was not looked at; this training scores it, once.",
    ]
    text = recipe_of(settings, method, winner.values, opening)
    storage.write_bytes(path, text.encode())
    journal.artifact_bytes(text.encode(), f"recipes/{slug(method)}.yaml")
    journal.metrics({f"best_val_map/{slug(method)}": value}, 0)
    print(f"{method}: val mAP {100 * value:.2f}; train {path} to score the test split", flush=True)
