"""Predict with a trained model: one photo for people, or shards, a folder or a bucket to Parquet files of scores.

python jobs/predict.py --model runs/first --image cat.jpg --show out.png
python jobs/predict.py --model runs/first --images data/mine/shards/test --out scores/test --bulk.top 20
python jobs/predict.py --model runs/first --images s3://bucket/photos --out s3://bucket/scores --bulk.top null

The second and third go on by the same command where they were stopped, and run as Ray tasks where a cluster is at hand
(`ray job submit -- python jobs/predict.py …`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.distributed.predict_run import PredictSettings, run_prediction


def main() -> int:
    settings = read_settings(PredictSettings, __doc__ or "")
    return run_job(lambda: run_prediction(settings))


if __name__ == "__main__":
    sys.exit(main())
