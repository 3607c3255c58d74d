"""Images and Open Images CSV files to WebDataset shards and label tables.

python jobs/prepare_openimages.py --release 2017_11 --images images --out data/mine --shards.size 448
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.prepare import PrepareSettings, prepare


def main() -> int:
    settings = read_settings(PrepareSettings, __doc__ or "")
    return run_job(lambda: prepare(settings))


if __name__ == "__main__":
    sys.exit(main())
