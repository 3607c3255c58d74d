"""Register a finished run's model in MLflow: as candidate, and as champion where it beats it on the same test.

python jobs/register.py --run runs/first --name birds
mlflow models serve -m models:/birds@champion --env-manager local

Training does so itself with --run.register birds.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.predict.register import RegisterSettings, register_run


def main() -> int:
    settings = read_settings(RegisterSettings, __doc__ or "")

    def work() -> None:
        register_run(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
