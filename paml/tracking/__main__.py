"""python -m paml.tracking RUN_FOLDER: sends to MLflow whatever of a run's journal it does not hold."""

from __future__ import annotations

import argparse
import sys
import time

from paml.errors import PamlError
from paml.secrets import without_keys
from paml.tracking.follower import replay
from paml.tracking.journal import END_STATUSES
from paml.tracking.view import reason


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m paml.tracking", description=__doc__)
    parser.add_argument("run_folder", help="folder of the run: a local path or s3://bucket/key")
    parser.add_argument(
        "--tracking-uri",
        help="MLflow server or store (default: MLFLOW_TRACKING_URI, else mlflow.db beside the run)",
    )
    parser.add_argument(
        "--status",
        choices=END_STATUSES,
        help="end a run whose driver was killed (default: as in the journal)",
    )
    options = parser.parse_args(arguments)
    start = time.monotonic()
    try:
        report = replay(
            options.run_folder,
            options.tracking_uri,
            status=options.status,
            progress=_progress(sys.stderr.isatty()),
        )
    except (PamlError, ValueError, OSError) as error:
        print(f"not refilled: {without_keys(str(error))}", file=sys.stderr)
        return 1
    except Exception as error:
        # Whatever MLflow and its stores raise: what is in MLflow by now stays, and the next try goes on.
        print(f"not refilled, MLflow is away ({reason(error)}): run this again later", file=sys.stderr)
        return 1
    print(report)
    print(f"done in {time.monotonic() - start:.1f} s")
    return 1 if report.refused or report.unreadable else 0


def _progress(terminal: bool):
    shown = 0.0

    def show(done: int, total: int) -> None:
        nonlocal shown
        now = time.monotonic()
        if done == total or now - shown > (0.2 if terminal else 10):
            shown = now
            end = "\r" if terminal and done < total else "\n"
            print(f"sent {done} of {total} events", end=end, file=sys.stderr, flush=True)

    return show


if __name__ == "__main__":
    sys.exit(main())
