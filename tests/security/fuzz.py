"""Random files and records for every parser: `make fuzz N=1000000`, or `python -m tests.security.fuzz --help`.

An input is one file or one record for a parser. Input i of a parser depends only on the seed, the parser and i, so a
count can be continued (`--state`) and a finding reproduced. About a thousand inputs at a time run in a separate process
with limits on memory and time, so a crash of native code is a finding too.
"""

import argparse
import faulthandler
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any, NamedTuple

SECONDS = 10.0
"""CPU time limit of an input (or a file of records); the parent process ends a chunk that blocks."""
MEMORY_BYTES = 3 << 30
"""Above the memory of the process at its start."""
CHUNK = 2048


class Finding(NamedTuple):
    """An input that led to neither a result nor a documented error."""

    target: str
    number: int
    """Number of the input, or of the first one in its file."""
    what: str


class Hang(BaseException):
    """An input takes too long."""


def input_of(target: str, seed: int, number: int) -> bytes:
    """Input `number` of a parser."""
    from tests.security.targets import TARGETS

    return TARGETS[target].make(random.Random(f"{seed}/{target}/{number}"))


def run_chunk(target: str, seed: int, start: int, count: int, folder: Path) -> dict[str, Any]:
    """Run `count` inputs. Returns results, refusals and findings; `distinct` holds 8 bytes of each input's digest."""
    from tests.security.targets import TARGETS

    batch, feed = TARGETS[target].batch, TARGETS[target].feed
    results = refused = 0
    findings: list[Finding] = []
    distinct: set[bytes] = set()
    for first in range(start, start + count, batch):
        inputs = [input_of(target, seed, number) for number in range(first, min(first + batch, start + count))]
        distinct.update(hashlib.blake2b(data, digest_size=8).digest() for data in inputs)
        (folder / "now").write_text(str(first))
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            good, bad = feed(inputs, folder)
            results, refused = results + good, refused + bad
        except Hang:
            findings.append(Finding(target, first, f"more than {SECONDS:g} s"))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            place = traceback.extract_tb(error.__traceback__)[-1]
            own = [f for f in traceback.extract_tb(error.__traceback__) if "/paml/" in f.filename]
            at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else f"{place.filename}:{place.lineno}"
            findings.append(Finding(target, first, f"{type(error).__name__} at {at}: {str(error)[:160]}"))
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return {"results": results, "refused": refused, "findings": findings, "distinct": distinct}


def _child(line: Any, target: str, seed: int, start: int, count: int, folder: Path, log: str) -> None:
    faulthandler.enable(open(log, "w"))  # noqa: SIM115
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    _bound_memory()

    def ring(number: int, frame: object) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, ring)
    line.send(run_chunk(target, seed, start, count, folder))


def _bound_memory() -> None:
    held = next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines() if "VmData" in row)
    resource.setrlimit(resource.RLIMIT_DATA, (held * 1024 + MEMORY_BYTES,) * 2)


def chunk_apart(target: str, seed: int, start: int, count: int) -> dict[str, Any]:
    """`run_chunk` in a separate process; its death is a finding."""
    from tests.security.targets import folder_for

    root = tempfile.mkdtemp(prefix="paml-fuzz-")
    folder, log = folder_for(target, root), os.path.join(root, "died")
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(False)
    process = context.Process(target=_child, args=(theirs, target, seed, start, count, folder, log))
    process.start()
    theirs.close()
    try:
        if ours.poll(600):
            return ours.recv()
        raise EOFError("it hangs in native code")
    except EOFError as error:
        process.kill()
        process.join()
        last = int((folder / "now").read_text()) if (folder / "now").exists() else start
        output = Path(log).read_text().splitlines()
        why = f"process died ({process.exitcode}) {error}: {output[0] if output else ''}"
        return {"results": 0, "refused": 0, "findings": [Finding(target, last, why)], "distinct": set(), "died": last}
    finally:
        process.join(5)
        if process.is_alive():
            process.kill()
        shutil.rmtree(root, ignore_errors=True)


def shares(count: int) -> dict[str, int]:
    """How many inputs each parser gets of `count`; at least one each."""
    from tests.security.targets import TARGETS

    total = sum(target.share for target in TARGETS.values())
    return {name: max(1, -(-count * target.share // total)) for name, target in TARGETS.items()}


def table(done: dict[str, dict[str, Any]]) -> str:
    """Counts by parser, as Markdown."""
    lines = [
        "| parser | inputs | distinct | results | refused | findings | CPU s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    sums = [0, 0, 0, 0, 0, 0.0]
    for name, row in done.items():
        cells = [row["inputs"], row["distinct"], row["results"], row["refused"], row["findings"], row["seconds"]]
        sums = [a + b for a, b in zip(sums, cells, strict=True)]
        lines.append(f"| {name} | " + " | ".join(f"{cell:,.0f}" for cell in cells) + " |")
    return "\n".join([*lines, "| all | " + " | ".join(f"{cell:,.0f}" for cell in sums) + " |"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.security.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000, help="inputs over all parsers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="parsers whose names hold this text")
    parser.add_argument("--state", help="JSON file from which a stopped count continues")
    options = parser.parse_args(arguments)
    from tests.security import targets

    wanted = {name: n for name, n in shares(options.count).items() if not options.only or options.only in name}
    state = Path(options.state) if options.state else None
    done: dict[str, dict[str, Any]] = json.loads(state.read_text()) if state and state.exists() else {}
    found = 0
    for name, count in wanted.items():
        blank = {"inputs": 0, "distinct": 0, "results": 0, "refused": 0, "findings": 0, "seconds": 0.0}
        row = done.setdefault(name, blank)
        chunk = max(targets.TARGETS[name].batch * 2, CHUNK)
        distinct: set[bytes] = set()
        if row["inputs"]:  # inputs before the stop
            distinct.update(
                hashlib.blake2b(input_of(name, options.seed, n), digest_size=8).digest() for n in range(row["inputs"])
            )
        last_print = time.monotonic()
        while row["inputs"] < count:
            cpu_before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            size = min(chunk, count - row["inputs"])
            got = chunk_apart(name, options.seed, row["inputs"], size)
            if "died" in got:  # continue after the input that killed it
                size = got["died"] - row["inputs"] + targets.TARGETS[name].batch
            distinct |= got["distinct"]
            for key in ("results", "refused"):
                row[key] += got[key]
            row["inputs"] += size
            row["distinct"] = len(distinct)
            row["findings"] += len(got["findings"])
            row["seconds"] += resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - cpu_before
            found += len(got["findings"])
            for finding in got["findings"]:
                print(f"FOUND {finding.target} input {finding.number}: {finding.what}", flush=True)
            if state:
                state.write_text(json.dumps(done))
            if time.monotonic() - last_print > 20 or row["inputs"] >= count:
                last_print = time.monotonic()
                speed = row["inputs"] / max(row["seconds"], 1e-9)
                print(f"{name}: {row['inputs']:,} of {count:,} ({speed:,.0f} a CPU second)", flush=True)
    print(table(done), flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
