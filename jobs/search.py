"""Find each method's best settings by successive halving, on the validation split alone.

ray job submit --working-dir . -- python jobs/search.py --config jobs/recipes/search_coco18.yaml

Each method's winner becomes a recipe for jobs/train_openimages.py, which scores the test split, once. The same command
goes on after a stop. A method is a mapping of dotted settings; its further key `space` adds to the common one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.compare.settings import SearchSettings

RECIPE = Path(__file__).resolve().parent / "recipes" / "search_coco18.yaml"


def main() -> int:
    settings = read_settings(SearchSettings, __doc__ or "", default_config=str(RECIPE))

    def work() -> int:
        from paml.distributed.search_run import run_search

        return run_search(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
