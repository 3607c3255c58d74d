"""Images and labels (Open Images CSV files, or one's own) to WebDataset shards and label tables.

python jobs/prepare_openimages.py --release 2017_11 --images images --out data/mine --shards.size 448
ray job submit --working-dir . -- python jobs/prepare_openimages.py --config jobs/recipes/openimages_v3_data.yaml

Stop it and start it again at will: the same command goes on where it stood. --plan true says beforehand what it
would take.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.prepare import PrepareSettings


def main() -> int:
    settings = read_settings(PrepareSettings, __doc__ or "")

    def work() -> int:
        from paml.distributed.prepare_run import run_preparation

        return run_preparation(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
