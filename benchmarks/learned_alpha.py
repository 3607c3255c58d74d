"""What if alpha were learned, for each class by itself? An experiment beside the product, on the photos of coco18.

python benchmarks/learned_alpha.py --labels single    (prepare with jobs/recipes/prepare_coco18.yaml first)

alpha_k = 1 + (alpha - 1) exp(g_k), g_k from 0 on learned at the head's rate, in training and in scoring; LL-R on cached
features (the last convolution and the head), beside the same training with alpha as it is. Figures by epoch and, at the
end, the test split; then the alphas that were learned.
"""

import argparse
import os
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.compare.grid import base_settings, training
from paml.compare.settings import CompareSettings
from paml.models.cam import CamClassifier, head_parameters
from paml.training import evaluate, loop, optimiser
from paml.training.loop import Watcher, train
from paml.training.world import World

RECIPE = Path(__file__).resolve().parents[1] / "jobs" / "recipes" / "coco18.yaml"
TABLES = {"single": "labels/train-single.arrow", "partial": "labels/train.arrow"}
build_fixed, pool_fixed = loop.build_model, evaluate.pool_logits


class LearnedBoost(CamClassifier):
    """The classifier with a factor on alpha - 1 for each class."""

    gain_K: nn.Parameter

    def forward(self, images_BCHW: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """As the classifier's."""
        return self.pool(self.maps(images_BCHW), alpha)

    def alpha_K(self, alpha: float) -> torch.Tensor:
        """What stands for `alpha`, float32 [K]."""
        return 1 + (alpha - 1) * self.gain_K.exp()

    def pool(self, maps_BKHW: torch.Tensor, alpha: float) -> torch.Tensor:
        """float32 logits [B, K]."""
        alpha_K11 = self.alpha_K(alpha)[:, None, None]
        maps_BKHW = maps_BKHW.float()
        return torch.where(maps_BKHW > 0, alpha_K11 * maps_BKHW, maps_BKHW).mean((2, 3))


def learn_alpha(models: list[LearnedBoost]) -> None:
    """From now on every training's network is a LearnedBoost, which `models` gets."""

    def build(*given: object, **named: object) -> CamClassifier:
        model = build_fixed(*given, **named)  # pyright: ignore
        model.__class__ = LearnedBoost
        model.gain_K = nn.Parameter(torch.zeros(model.head.out_channels))
        models.append(model)  # pyright: ignore
        return model

    loop.build_model = build
    optimiser.head_parameters = lambda model: [*head_parameters(model), model.gain_K]  # pyright: ignore
    evaluate.pool_logits = lambda maps_BKHW, alpha: models[-1].pool(maps_BKHW, alpha)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", choices=TABLES, default="single")
    parser.add_argument("--storage", default="runs/learned_alpha")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    changed = {
        "workers.num_workers": 0,
        "run.system_seconds": 0,
        "model.train_from": "features.18",
        "model.frozen_layers": 0,
        "data.image_size": options.image_size,
        "data.train_labels": TABLES[options.labels],
        "epochs": options.epochs,
        "seed": options.seed,
        "boost.eval_also": [1.0],
    }
    grid = CompareSettings(
        base=str(RECIPE), methods={"LL-R": {"loss.name": "ll-r"}}, storage=options.storage, mlflow=False
    )
    models: list[LearnedBoost] = []
    for name in ("fixed", "learned"):
        if name == "learned":
            learn_alpha(models)
        run = f"{options.labels}-{name}-seed{options.seed}"
        settings = training(grid, run, "LL-R", base_settings(grid) | changed, os.getcwd()).settings
        result = train(settings, World(), Watcher(say=lambda line, name=name: print(f"{name}: {line}", flush=True)))
        for alpha, scored in result.test.items():
            best = result.best[alpha]
            said = f"validation {100 * best['map']:.2f} (epoch {best['epoch']}), test {100 * scored.map:.2f}"
            print(f"{name}, alpha {alpha} in scoring: {said}", flush=True)
    learned = models[-1].alpha_K(float(base_settings(grid)["boost.train"])).detach()
    print("alphas learned, by class:", ", ".join(f"{alpha:.2f}" for alpha in learned.tolist()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
