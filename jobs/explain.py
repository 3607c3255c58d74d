"""Compare the class activation maps of two or more checkpoints on the same images, as the BoostLU paper does.

Writes one row a label (Parquet), a summary (text, CSV) and figures: how alike the maps are, their highest and lowest
scores, maps beside the pictures, rejected labels by epoch. For example

python jobs/explain.py --runs '{full: runs/full, AN: runs/an, AN + boost: "runs/an:alpha=5", LL-R + BoostLU: runs/llr}'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.explain.analysis import ExplainSettings, explain


def main() -> int:
    settings = read_settings(ExplainSettings, __doc__ or "")

    def work() -> None:
        explain(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
