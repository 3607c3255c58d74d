"""`python -m tests.chaos --count 200 --seed 0 --report benchmarks/chaos.md`: a long campaign of random faults."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.chaos.campaign import report, run_campaign, save, split
from tests.chaos.schedule import FORMS


def main() -> int:
    """Returns 1 if a guarantee was violated."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS))
    parser.add_argument("--report", type=Path)
    parser.add_argument("--keep", type=Path, help="work in this folder and keep it")
    chosen = parser.parse_args()
    counts = split(chosen.count, chosen.forms)

    def work(folder: Path) -> int:
        campaign = run_campaign(
            folder,
            counts,
            chosen.seed,
            lambda line: print(line, flush=True),
            lambda campaign: save(campaign, chosen.report) if chosen.report else None,
        )
        if chosen.report:
            save(campaign, chosen.report)
        print(report(campaign))
        return 0 if campaign.passed else 1

    if chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
        return work(chosen.keep.resolve())
    with tempfile.TemporaryDirectory(prefix="paml-chaos-") as folder:
        return work(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
