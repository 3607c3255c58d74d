"""jobs/train_openimages.py, traced and ready to be struck."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]


def main() -> int:
    """As the job's own."""
    import train_openimages

    from tests.chaos import inject

    if os.environ["PAML_CHAOS_FORM"] == "plain":  # Ray takes seconds to load
        inject.install()
    else:
        inject.install_on_workers()
    return train_openimages.main()


if __name__ == "__main__":
    sys.exit(main())
