"""The code blocks of the README and the docs that follow `<!-- run -->` run as they are printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- run -->\n```(bash|python)\n(.*?)```", re.DOTALL)
PAGES = {
    page: BLOCK.findall((ROOT / page).read_text()) for page in ("README.md", "docs/quickstart.md", "docs/own-data.md")
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the pages assume: my/images, my/labels.csv, cat.jpg, and backbone weights where PyTorch looks for them."""
    rng = np.random.default_rng(0)
    images = tmp_path / "my" / "images"
    images.mkdir(parents=True)
    rows = ["image,class,state"]
    for number in range(60):
        is_cat = number % 2 == 0
        pixels = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        pixels[16:48, 16:48, 0 if is_cat else 2] += 180
        Image.fromarray(pixels).save(images / f"{number:04}.jpg")
        rows += [f"{number:04},cat,{int(is_cat)}"] + ([f"{number:04},dog,{int(not is_cat)}"] if number % 3 else [])
    (tmp_path / "my" / "labels.csv").write_text("\n".join(rows) + "\n")
    Image.open(images / "0000.jpg").save(tmp_path / "cat.jpg")
    checkpoints = tmp_path / "torch" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rsplit("/", 1)[1]
    torch.save(torchvision.models.resnet18().state_dict(), checkpoints / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_in_order(page: str, folder: Path) -> None:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TORCH_HOME": str(folder / "torch"),
        "PYTHONPATH": str(ROOT),
    }
    assert PAGES[page]
    for language, code in PAGES[page]:
        if "paml demo" in code:  # has a test of its own
            continue
        command = ["bash", "-euo", "pipefail", "-c", code] if language == "bash" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
