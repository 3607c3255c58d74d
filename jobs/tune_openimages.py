"""`paml tune` with the Open Images recipe: ray job submit --working-dir . -- python jobs/tune_openimages.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import main_with_recipe

if __name__ == "__main__":
    sys.exit(main_with_recipe("tune", "tune_openimages", sys.argv[1:]))
