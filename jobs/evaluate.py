"""Score a run's checkpoint on a split: mAP, the five class groups and micro figures, over annotated pairs.

python jobs/evaluate.py --run runs/openimages-v3 --split test --alphas '[1, 5]'
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.training.score_run import EvaluateSettings, evaluate


def main() -> int:
    settings = read_settings(EvaluateSettings, __doc__ or "")

    def work() -> None:
        evaluate(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
