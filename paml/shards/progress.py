"""Progress of long work: a bar on a terminal, elsewhere a line every ten seconds, with rate and time left."""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with (what is done: "images" or "shards", how many, of how many)."""

_LINE_SECONDS = 10.0
_WINDOW_SECONDS = 60.0


class Rate:
    """Units a second over the last minute: what an earlier run did does not count."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    def update(self, done: int) -> float | None:
        """Told how many are done in all; the rate, or None as long as none can be told."""
        now = self._clock()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _WINDOW_SECONDS:
            self._seen.popleft()
        begun, before = self._seen[0]
        return (done - before) / (now - begun) if now > begun and done > before else None


def line_of(what: str, done: int, total: int, rate: float | None) -> str:
    """E.g. `images: 12,000 of 1,743,042 (0.7 %), 182.0/s, 2 h 39 min left`."""
    text = f"{what}: {done:,} of {total:,} ({100 * done / max(total, 1):.1f} %)"
    return text if rate is None else f"{text}, {rate:,.1f}/s, {duration(max(total - done, 0) / rate)} left"


def duration(seconds: float) -> str:
    """E.g. `2 h 39 min`, `4 min 10 s`, `12 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


@contextlib.contextmanager
def showing(progress: Progress | None, say: Callable[[str], None] | None = None) -> Iterator[Progress]:
    """`progress` itself where given; else a bar where standard error is a terminal; else lines by `say`."""
    if progress is not None:
        yield progress
    elif sys.stderr.isatty():
        with _bars() as show:
            yield show
    else:
        yield lines(say or (lambda line: print(line, file=sys.stderr, flush=True)))


@contextlib.contextmanager
def _bars() -> Iterator[Progress]:
    from tqdm import tqdm

    bars: dict[str, Any] = {}

    def show(what: str, done: int, total: int) -> None:
        if what not in bars:
            # What is done at the first call was done by an earlier run, and does not count for the rate.
            bars[what] = tqdm(total=total, initial=done, unit=f" {what}", unit_scale=total > 100_000, smoothing=0.05)
        bars[what].total = total
        bars[what].update(done - bars[what].n)

    try:
        yield show
    finally:
        for bar in bars.values():
            bar.close()


def lines(say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> Progress:
    """Progress as a line every ten seconds."""
    rates: dict[str, Rate] = {}
    said = clock()

    def show(what: str, done: int, total: int) -> None:
        nonlocal said
        rate = rates.setdefault(what, Rate(clock)).update(done)
        if clock() - said >= _LINE_SECONDS:
            said = clock()
            say(line_of(what, done, total, rate))

    return show
