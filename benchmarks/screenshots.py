"""Screenshots of MLflow and of the review page for the docs, from the demo's scenes of handwritten digits.

    python -m benchmarks.screenshots            # about 5 minutes on 2 cores; needs Chromium
    python -m benchmarks.screenshots --shoot    # screenshots of existing runs

Trains a run and a small sweep and audits the run in --work, starts MLflow, and writes
benchmarks/pages/{run,rejected,sweep,settings,audit,charts,trials}.png of at most 200 KB each.
"""

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import yaml
from PIL import Image

from paml import demo
from paml.distributed.local_head import ray_head
from paml.tracking.mlflow_sink import read_state
from tests.helpers.browser import Browser
from tests.tracking.conftest import MlflowServer

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "pages"
MAX_BYTES = 200_000
WIDTH = 1440
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONUNBUFFERED": "1"}
CLOSE_ASSISTANT = """(keys => {
    for (const key of keys) {
        localStorage.setItem(key, "false");
        localStorage.setItem(key.replace("mlflow.assistant.panelOpen", "mlflow.workflowType"), '"machine_learning"');
    }
    return keys.length;
})(Object.keys(localStorage).filter(key => key.includes("mlflow.assistant.panelOpen")))"""
"""Closes MLflow's assistant panel and selects the side bar of model training."""
SCROLL_TO = """((section, chart) => {
    const headings = [...document.querySelectorAll("*")].filter(one => one.textContent.startsWith(section + "("));
    headings.pop()?.scrollIntoView();
    return document.body.textContent.includes(chart);
})"""
"""Scrolls to a section; true once the chart is drawn."""
SPACE = {
    "loss.name": ["ll-r", "ll-ct"],
    "loss.reject_rate_step": {"log_uniform": [2.0e-3, 5.0e-2]},
    "boost.train, boost.eval": [[1, 1], [3, 3], [5, 5]],
    "optimizer.learning_rate": {"log_uniform": [2.0e-4, 6.0e-3]},
}


def paml(*arguments: object, env: dict[str, str]) -> None:
    """Run a paml command with its output on this terminal."""
    command = list(map(str, arguments))
    print("$ paml", *command, flush=True)
    subprocess.run([sys.executable, "-m", "paml", *command], cwd=ROOT, env=env, check=True)


def make_runs(work: Path, server: MlflowServer) -> None:
    """Train, sweep and audit; what is finished is reused."""
    data, weights = demo.prepare_scenes(work / "data", 0), demo.pretrain_backbone(work / "data")
    env = os.environ | ENVIRONMENT | {"MLFLOW_TRACKING_URI": server.uri}
    run = work / "runs" / "digits"
    if not (run / "result.json").exists():
        options = {
            "data.root": data,
            "model.weights": weights,
            "run.storage": work / "runs",
            "run.name": "digits",
            "run.resume": str(run.exists()).lower(),
            "epochs": 6,
            "checkpoint.keep": 6,
            "workers.num_workers": 0,
        }
        paml("train", "--config", "demo", *(f"--{name}={value}" for name, value in options.items()), env=env)
    common = {
        "data.root": str(data),
        "data.features_dir": str(work / "features"),
        "model.weights": str(weights),
        "model.train_from": "layer2",
        "model.frozen_layers": 0,
        "workers.num_workers": 0,
        "checkpoint.keep": 1,
        "epochs": 4,
    }
    sweep = {
        "base": "demo",
        "common": common,
        "storage": str(work / "runs" / "tuned"),
        "experiment": "digits-sweep",
        "search": "optuna",
        "trials": 9,
        "scheduler": "asha",
        "grace_epochs": 2,
        "reduction_factor": 2,
        "space": SPACE,
    }
    if not (work / "runs" / "tuned" / "sweep" / "best.yaml").exists():
        config = work / "sweep.yaml"
        config.write_text(yaml.safe_dump(sweep, sort_keys=False))
        with ray_head(ROOT, cpus=2) as ray:
            paml("tune", "--config", config, env=env | dict(ray))
    if not (work / "audit" / "page.html").exists():
        limits = ("--missing", 60, "--wrong", 20, "--checkpoints", 2)
        paml("audit", "--run", run, *limits, "--out", work / "audit", env=env)


def take_screenshots(work: Path, server: MlflowServer) -> None:
    run, sweep = (run_url(server, work / "runs" / name) for name in ("digits", "tuned/sweep"))
    with open_browser(server, 1000) as browser:
        browser.visit(run, "Repeat:", "labels rejected", "Finished")
        save_screenshot(browser, "run")
        browser.visit(f"{run}/artifacts/rejected_labels.html", "rejected_labels.html")
        save_screenshot(browser, "rejected")
        browser.visit(sweep, "Best:", "Finished")
        save_screenshot(browser, "sweep")
        charts = browser.run("[...document.links].find(link => link.textContent.includes('charts')).href")
        browser.visit(f"{sweep}/artifacts/figures/score_by_setting.png", "parallel_coordinates.png")
        browser.until("[...document.images].some(one => one.naturalWidth > 300)", "the plot")
        save_screenshot(browser, "settings")
        browser.open(work / "audit" / "page.html")
        save_screenshot(browser, "audit")
        browser.visit(f"{run}/model-metrics", "rejection(", "val(")
        browser.until(f"{SCROLL_TO}('rejection', 'digits (rejection/rejected)')", "the chart of rejected labels")
        save_screenshot(browser, "charts")
        browser.visit(charts, "sweep-0001 (groups/G1)")
        browser.until(f"{SCROLL_TO}('val', 'sweep-0001 (val/mAP)')", "the chart of validation mAP")
        save_screenshot(browser, "trials")


@contextlib.contextmanager
def open_browser(server: MlflowServer, height: int) -> Iterator[Browser]:
    """A browser window of this height in pixels, with MLflow's assistant closed."""
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(Path(profile), height=height, width=WIDTH)
        try:
            browser.visit(server.uri, "MLflow")
            browser.until(CLOSE_ASSISTANT, "MLflow's assistant")
            yield browser
        finally:
            browser.close()


def run_url(server: MlflowServer, run_folder: Path) -> str:
    state = read_state(str(run_folder))[server.uri]
    return f"{server.uri}/#/experiments/{state['experiment_id']}/runs/{state['run_id']}"


def save_screenshot(browser: Browser, name: str) -> None:
    """Save the window as a PNG file, with as many colors as MAX_BYTES allows."""
    browser.wait_until_unchanged()
    path = OUT / f"{name}.png"
    browser.screenshot(path)
    image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
    for colors in (128, 64, 32, 16):
        image.quantize(colors, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MAX_BYTES:
            break
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} KB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/paml"), help="folder; it is visible in the screenshots")
    parser.add_argument("--port", type=int, default=5000, help="port of MLflow; with --shoot the same as before")
    parser.add_argument("--shoot", action="store_true", help="train nothing")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(exist_ok=True)
    server = MlflowServer(options.work, port=options.port)
    server.start()
    try:
        if not options.shoot:
            make_runs(options.work, server)
        take_screenshots(options.work, server)
    finally:
        server.kill()


if __name__ == "__main__":
    main()
