"""Stop signals: SIGTERM from `ray job stop`, and Ctrl-C."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from paml.errors import Stopped


@contextlib.contextmanager
def stopping() -> Iterator[list[int]]:
    """Raise Stopped in the block on SIGTERM and Ctrl-C; yields the signals received so far.

    `ray job stop` kills the process three seconds after SIGTERM. Has no effect outside of the main thread, which
    alone receives signals.
    """
    signals: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return

    def stop(number: int, frame: object) -> None:
        signals.append(number)
        raise Stopped(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
