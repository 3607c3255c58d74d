"""The pictures of the README's "Review in MLflow", from the demo's scenes of handwritten digits alone.

    python -m benchmarks.screenshots            # about 5 minutes on 2 cores; needs Chromium
    python -m benchmarks.screenshots --shoot    # what was trained before is shown again

Trains a run, a small sweep and an audit below --work, brings up MLflow over them, and writes
benchmarks/pages/{run,rejected,sweep,settings,audit,charts,trials}.png of at most 200 KB.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from PIL import Image

from jobs import demo
from paml.distributed.local_head import ray_head
from paml.tracking.view import read_memory
from tests.helpers.browser import Browser
from tests.tracking.conftest import MlflowServer

ROOT = Path(__file__).resolve().parents[1]
AT_HOME = """(keys => {
    for (const key of keys) {
        localStorage.setItem(key, "false");
        localStorage.setItem(key.replace("mlflow.assistant.panelOpen", "mlflow.workflowType"), '"machine_learning"');
    }
    return keys.length;
})(Object.keys(localStorage).filter(key => key.includes("mlflow.assistant.panelOpen")))"""
"""What two clicks do: the assistant's panel is closed, the side bar says Model training."""
DOWN_TO = """((section, chart) => {
    const found = [...document.querySelectorAll("*")].filter(one => one.textContent.startsWith(section + "("));
    found.pop()?.scrollIntoView();
    return document.body.textContent.includes(chart);
})"""
"""Scrolls to a section; whether a chart is drawn, which it is once it comes into sight."""
OUT = ROOT / "benchmarks" / "pages"
LARGEST = 200_000
WIDTH = 1440
QUIET = {"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1"}
SPACE = {
    "loss.name": ["ll-r", "ll-ct"],
    "loss.reject_rate_step": {"log_uniform": [2.0e-3, 5.0e-2]},
    "boost.train, boost.eval": [[1, 1], [3, 3], [5, 5]],
    "optimiser.learning_rate": {"log_uniform": [2.0e-4, 6.0e-3]},
}


def job(script: str, *options: str, env: dict[str, str]) -> None:
    """A job of the repository, its output on this terminal."""
    command = ["python", f"jobs/{script}", *options]
    print("$", *command, flush=True)
    subprocess.run([sys.executable, *command[1:]], cwd=ROOT, env=env, check=True)


def make(work: Path, server: MlflowServer) -> None:
    """Everything that the pictures show; what stands already stays."""
    demo.DATA = work / "data"
    data, weights = demo.make_data(0), demo.make_weights()
    env = os.environ | QUIET | {"MLFLOW_TRACKING_URI": server.uri}
    own = ["--data.root", str(data), "--model.weights", str(weights), "--run.storage", str(work / "runs")]
    run = work / "runs" / "digits"
    if not (run / "result.json").exists():
        resume = ["--run.resume", "true"] if run.exists() else []
        more = [
            "--run.name",
            "digits",
            "--epochs",
            "6",
            "--checkpoint.keep",
            "6",
            "--workers.num_workers",
            "0",
            *resume,
        ]
        job("train_openimages.py", "--config", "jobs/recipes/demo.yaml", *own, *more, env=env)
    common = {
        "data.root": str(data),
        "data.features_dir": str(work / "features"),
        "model.weights": str(weights),
        "model.train_from": "layer2",
        "model.frozen_layers": 0,
        "workers.num_workers": 0,
        "run.system_seconds": 0,
        "checkpoint.keep": 1,
        "epochs": 4,
    }
    sweep = {
        "base": "jobs/recipes/demo.yaml",
        "common": common,
        "storage": str(work / "runs" / "tried"),
        "experiment": "digits-sweep",
        "search": "optuna",
        "trials": 9,
        "scheduler": "asha",
        "first_epochs": 2,
        "eta": 2,
        "space": SPACE,
    }
    if not (work / "runs" / "tried" / "sweep" / "best.yaml").exists():
        config = work / "sweep.yaml"
        config.write_text(yaml.safe_dump(sweep, sort_keys=False))
        with ray_head(ROOT, cpus=2) as ray:
            job("tune_openimages.py", "--config", str(config), env=env | dict(ray))
    if not (work / "audit" / "page.html").exists():
        finds = ["--finds", "60", "--observed_finds", "20", "--checkpoints", "2", "--out", str(work / "audit")]
        job("audit_labels.py", "--run", str(run), *finds, env=env)


def shoot(work: Path, server: MlflowServer) -> None:
    """One picture after the other."""
    run, tried = (address(server, work / "runs" / name) for name in ("digits", "tried/sweep"))
    with browser_of(server, 1000) as browser:
        browser.visit(run, "Repeat:", "labels rejected", "Finished")
        picture(browser, "run")
        browser.visit(f"{run}/artifacts/rejected_labels.html", "rejected_labels.html")
        picture(browser, "rejected")
        browser.visit(tried, "Best:", "Finished")
        picture(browser, "sweep")
        charts = browser.run("[...document.links].find(link => link.textContent === 'Their charts').href")
        browser.visit(f"{tried}/artifacts/figures/score_by_setting.png", "parallel_coordinates.png")
        browser.until("[...document.images].some(one => one.naturalWidth > 300)", "the picture")
        picture(browser, "settings")
        browser.open(work / "audit" / "page.html")
        picture(browser, "audit")
        browser.visit(f"{run}/model-metrics", "rejection(", "val(")
        browser.until(f"{DOWN_TO}('rejection', 'digits (rejection/rejected)')", "the chart of rejected labels")
        picture(browser, "charts")
        browser.visit(charts, "sweep-0001 (groups/G1)")
        browser.until(f"{DOWN_TO}('val', 'sweep-0001 (val/map)')", "the chart of validation")
        picture(browser, "trials")


@contextlib.contextmanager
def browser_of(server: MlflowServer, height: int) -> Iterator[Browser]:
    """A window of so many pixels, and a profile that has been used before."""
    import tempfile

    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile), height=height, width=WIDTH)
        try:
            browser.visit(server.uri, "MLflow")
            browser.until(AT_HOME, "MLflow's assistant")
            yield browser
        finally:
            browser.close()


def address(server: MlflowServer, run_folder: Path) -> str:
    """Of a run's page."""
    memory = read_memory(str(run_folder))[server.uri]
    return f"{server.uri}/#/experiments/{memory['experiment_id']}/runs/{memory['run_id']}"


def picture(browser: Browser, name: str) -> None:
    """What the window shows, in few colours."""
    browser.still()
    path = OUT / f"{name}.png"
    browser.screenshot(path)
    shot = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    for colours in (128, 64, 32, 16):
        shot.quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= LARGEST:
            break
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/paml"), help="its path is to be seen in the pictures")
    parser.add_argument("--port", type=int, default=5000, help="of MLflow; the same as before with --shoot")
    parser.add_argument("--shoot", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(exist_ok=True)
    server = MlflowServer(arguments.work, port=arguments.port)
    server.start()
    try:
        if not arguments.shoot:
            make(arguments.work, server)
        shoot(arguments.work, server)
    finally:
        server.kill()


if __name__ == "__main__":
    main()
