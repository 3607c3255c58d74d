"""Train a grid of methods and seeds on one data set under one budget, and print their table.

ray job submit --working-dir . -- python jobs/compare.py --config jobs/recipes/compare_coco18.yaml

The same command goes on after a stop, and trains what failed. A method is a mapping of dotted settings; its further
key `rows` scores one training with several alphas: {loss.name: an, boost.train: 1, rows: {AN: 1, AN + boost: 5}}.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.compare.settings import CompareSettings

RECIPE = Path(__file__).resolve().parent / "recipes" / "compare_coco18.yaml"


def main() -> int:
    settings = read_settings(CompareSettings, __doc__ or "", default_config=str(RECIPE))

    def work() -> int:
        from paml.distributed.compare_run import run_compare

        return run_compare(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
