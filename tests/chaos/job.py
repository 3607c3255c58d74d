"""`paml train`, with traces and orders."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> int:
    """Run the command."""
    from paml import cli
    from tests.chaos import inject

    if os.environ["PAML_CHAOS_FORM"] == "plain":  # importing Ray takes seconds
        inject.install()
    else:
        inject.install_on_workers()
    return cli.main(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
