"""Export a trained model to ONNX and torch.export files, with and without maps, each checked against the checkpoint.

python jobs/export.py --model runs/first --out runs/first-export
python jobs/export.py --model 'runs/first@best:alpha=5' --out s3://bucket/model --formats [onnx] --maps without

The files take uint8 RGB pictures [B, S, S, 3] (S is image_size in model.json) and give logits, scores and maps.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.cli import read_settings, run_job
from paml.predict.export import ExportSettings, export


def main() -> int:
    settings = read_settings(ExportSettings, __doc__ or "")

    def work() -> None:
        export(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
