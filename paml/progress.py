"""Progress of long operations: a bar on a terminal, otherwise a line every ten seconds, with rate and time left."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with (unit such as "images" or "shards", number done, total)."""

_LINE_SECONDS = 10.0


def format_progress(unit: str, done: int, total: int, rate: float | None) -> str:
    """E.g. `images: 12,000 of 1,743,042 (0.7 %), 182.0/s, 2 h 39 min left`."""
    text = f"{unit}: {done:,} of {total:,} ({100 * done / max(total, 1):.1f} %)"
    return text if rate is None else f"{text}, {rate:,.1f}/s, {format_duration(max(total - done, 0) / rate)} left"


def format_duration(seconds: float) -> str:
    """E.g. `2 h 39 min`, `4 min 10 s`, `12 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextlib.contextmanager
def progress_display(progress: Progress | None, log: Callable[[str], None] | None = None) -> Iterator[Progress]:
    """`progress` if given; otherwise a bar if standard error is a terminal; otherwise lines through `log`."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield log_progress(log or (lambda line: print(line, file=sys.stderr, flush=True)))


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(unit: str, done: int, total: int) -> None:
        if unit not in bars:
            # an earlier run did what is done at the first call; it does not count for the rate
            bars[unit] = tqdm(total=total, initial=done, unit=f" {unit}", unit_scale=total > 100_000, smoothing=0.05)
        bars[unit].total = total
        bars[unit].update(done - bars[unit].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def log_progress(log: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Progress:
    """Log a progress line every ten seconds, with the average rate since the first call."""
    started: dict[str, tuple[float, int]] = {}
    last_line = clock()

    def show(unit: str, done: int, total: int) -> None:
        nonlocal last_line
        now = clock()
        start, before = started.setdefault(unit, (now, done))  # what an earlier run did does not count
        if now - last_line >= _LINE_SECONDS:
            last_line = now
            rate = (done - before) / (now - start) if now > start and done > before else None
            log(format_progress(unit, done, total, rate))

    return show
