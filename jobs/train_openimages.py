"""Train a CAM + BoostLU network with large-loss rejection on partial labels.

ray job submit -- python jobs/train_openimages.py --config jobs/recipes/openimages_v3.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.training.settings import TrainSettings

RECIPE = Path(__file__).resolve().parent / "recipes" / "openimages_v3.yaml"


def main() -> int:
    settings = read_settings(TrainSettings, __doc__ or "", default_config=str(RECIPE))

    def work() -> int:
        from paml.distributed.run import run_training

        return run_training(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
