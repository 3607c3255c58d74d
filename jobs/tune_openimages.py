"""Ray Tune over alpha, reject rate, scheme, learning rate or any other setting of a training, on the validation split.

ray job submit --working-dir . -- python jobs/tune_openimages.py --config jobs/recipes/sweep_openimages.yaml

Ends with a table of trials, pictures, and the best recipe for jobs/train_openimages.py, which scores the test split,
once. The same command goes on after a stop or a kill: finished trials are kept, unfinished ones go on from their
checkpoints. --plan true says beforehand what would be trained.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.compare.settings import SweepSettings

RECIPE = Path(__file__).resolve().parent / "recipes" / "sweep_openimages.yaml"


def main() -> int:
    settings = read_settings(SweepSettings, __doc__ or "", default_config=str(RECIPE))

    def work() -> int:
        from paml.distributed.tune_run import run_sweep

        return run_sweep(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
