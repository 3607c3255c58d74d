"""Train a CAM + BoostLU network with large-loss rejection on partial labels.

ray job submit -- python jobs/train_openimages.py --config jobs/recipes/openimages_v3.yaml
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml import storage
from paml.cli import read_settings, run_job
from paml.errors import DataError
from paml.training.settings import TrainSettings

RECIPE = Path(__file__).resolve().parent / "recipes" / "openimages_v3.yaml"
OPENIMAGES = "data/openimages_v3"
TWO_COMMANDS = """Two commands make the Open Images V3 data. See what it takes in hours, disk and money:
  python jobs/prepare_openimages.py --config jobs/recipes/openimages_v3_data.yaml --plan true
Fetch the release from https://storage.googleapis.com/openimages/2017_11/ and the images from their public bucket, and
make shards and label tables of them (it can be stopped and started at will, and runs on a cluster by ray job submit):
  python jobs/prepare_openimages.py --config jobs/recipes/openimages_v3_data.yaml"""


def main() -> int:
    settings = read_settings(TrainSettings, __doc__ or "", default_config=str(RECIPE))

    def work() -> int:
        from paml.distributed.run import run_training

        try:
            return run_training(settings)
        except DataError as error:
            if settings.data.root == OPENIMAGES and not storage.exists(OPENIMAGES):
                raise DataError(f"{error}\n{TWO_COMMANDS}") from error
            raise

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
