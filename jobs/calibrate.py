"""Calibrate a run's scores on its validation split, and choose a threshold a class for a wanted precision.

python jobs/calibrate.py --run runs/first --check test
python jobs/calibrate.py --run 'runs/first@best:alpha=5' --calibration.method temperature --calibration.precision 0.95

Stored with the run's checkpoint and model; predictions, exports and the served model take it from there. It holds for
annotated pairs such as it was fitted on: on Open Images, for pairs that people verified.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.predict.calibrate import CalibrateSettings, calibrate_run


def main() -> int:
    settings = read_settings(CalibrateSettings, __doc__ or "")

    def work() -> None:
        calibrate_run(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
