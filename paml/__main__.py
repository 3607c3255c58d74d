"""`python -m paml`: the same as the command `paml`."""

import sys

from paml.cli import main

if __name__ == "__main__":
    sys.exit(main())
