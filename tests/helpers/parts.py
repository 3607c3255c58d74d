"""Sources that misbehave in a known way; importable, so that they travel to workers."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.shards.images import encoded, picture


@dataclasses.dataclass(frozen=True)
class DrawnPart:
    """Images of numbers first to end, drawn when they are read; nothing goes wrong."""

    name: str
    first: int
    end: int
    size: int = 64
    seconds_each: float = 0.0
    bytes: None = None

    @property
    def images(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for number in range(self.first, self.end):
            self.before(number)
            time.sleep(self.seconds_each)
            yield f"{number:016x}", encoded(picture(number, self.size, self.size), quality=90)

    def before(self, number: int) -> None:
        """Called before an image is drawn."""


@dataclasses.dataclass(frozen=True)
class DeadlyPart(DrawnPart):
    """Kills the process that reads its image `at`, as often as there are no more than `times` marks in `folder`."""

    folder: str = ""
    at: int = 0
    times: int = 1

    def before(self, number: int) -> None:
        if number == self.at and len(os.listdir(self.folder)) < self.times:
            Path(self.folder, f"mark-{time.time_ns()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class FailingPart(DrawnPart):
    """Cannot be read beyond its image `at`."""

    at: int = 0

    def before(self, number: int) -> None:
        if number == self.at:
            raise OSError(5, "the disk of this part is broken")


@dataclasses.dataclass(frozen=True)
class ShyPart(DrawnPart):
    """Cannot be read while another one of the same folder is."""

    folder: str = ""
    at_a_time: int = 1
    hold_seconds: float = 0.3
    """How long it waits for another one to come, once it is being read."""

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        mark, met = Path(self.folder, "reading"), Path(self.folder, "met")
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            met.touch()
            raise OSError(11, "somebody else reads") from None
        end = time.monotonic() + self.hold_seconds
        while time.monotonic() < end and not met.exists():
            time.sleep(0.05)
        yield from super().__iter__()
        mark.unlink()


def drawn_parts(images: int, parts: int, **options: float) -> list[DrawnPart]:
    """Some images in parts of unequal size."""
    ends = [images * (i + 1) ** 2 // parts**2 for i in range(parts)]
    return [
        DrawnPart(f"drawn-{i}", first, end, **options)  # pyright: ignore[reportArgumentType]
        for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
