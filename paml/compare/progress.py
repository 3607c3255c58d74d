"""Where a grid's trainings stand, for the line that each of them says."""

import re
import time
from collections.abc import Callable, Mapping

_EPOCH = re.compile(r"epoch (\d+)/\d+ ")


class Progress:
    """Counts epochs and trainings; the time left is told by the epochs done since this process began."""

    def __init__(self, epochs: Mapping[str, int], done: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        """epochs: training -> the epoch that it is to reach, of those not done. done: how many were done before."""
        self._left = dict(epochs)
        self._goal = dict(epochs)
        self._all, self._done = len(epochs) + done, done
        self._seen, self._begun, self._clock = 0, clock(), clock

    def line(self, name: str, said: str) -> str:
        """What a training has said, with its name and the state of the whole."""
        epoch = _EPOCH.match(said)
        if epoch is not None and name in self._left:
            self._seen += 1
            self._left[name] = max(0, self._goal[name] - int(epoch[1]))
        return f"{self._head()} {name}: {said}"

    def ended(self, name: str, error: str | None) -> str:
        """The line for a training that has ended, well or by `error`."""
        self._left.pop(name, None)
        self._done += 1
        return f"{self._head()} {name}: " + ("done" if error is None else f"FAILED: {error}")

    def _head(self) -> str:
        left = sum(self._left.values())
        if not self._seen or not left:
            return f"[{self._done}/{self._all} runs]"
        seconds = (self._clock() - self._begun) / self._seen * left
        return f"[{self._done}/{self._all} runs, {spoken(seconds)} left]"


def spoken(seconds: float) -> str:
    """A length of time in words: 2 h 05 min, 7 min, 40 s."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
