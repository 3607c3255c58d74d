"""`paml prepare` as a Ray job: ray job submit --working-dir . -- python jobs/prepare_openimages.py --config NAME"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", *sys.argv[1:]]))
