"""`paml train` with the Open Images recipe and two Ray workers: ray job submit -- python jobs/train_openimages.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import main_with_recipe

PREPARE = """The Open Images data are missing. Prepare them; the first command prints hours, disk space and costs:
  paml prepare --config openimages_v3_data --plan true
  paml prepare --config openimages_v3_data"""

if __name__ == "__main__":
    status = main_with_recipe("train", "openimages_v3", ["--workers.num_workers=2", *sys.argv[1:]])
    if status == 1 and len(sys.argv) == 1 and not Path("data/openimages_v3").exists():
        print(PREPARE, file=sys.stderr)
    sys.exit(status)
