"""Find the labels to look at again: unobserved ones that are likely positive, observed ones that are likely wrong.

Writes finds.parquet, finds.csv (as Open Images has machine labels) and page.html, where a person answers yes, no or
skip and exports annotations-human.csv rows, which --verdicts of jobs/prepare_openimages.py merges into the label table.

python jobs/audit_labels.py --run runs/openimages-v3 --finds 1000 --out runs/audit
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paml.audit.audit import AuditSettings, audit
from paml.cli import read_settings, run_job


def main() -> int:
    settings = read_settings(AuditSettings, __doc__ or "")

    def work() -> None:
        audit(settings)

    return run_job(work)


if __name__ == "__main__":
    sys.exit(main())
