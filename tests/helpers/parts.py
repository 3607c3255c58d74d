"""Sources that fail in known ways; importable, so workers can unpickle them."""

import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from tests.shards.images import encoded, gradient


@dataclasses.dataclass(frozen=True)
class GeneratedPart:
    """Images of numbers first to end, generated when they are read, without faults."""

    name: str
    first: int
    end: int
    size: int = 64
    seconds_each: float = 0.0
    bytes = None
    read_once = False

    @property
    def images(self) -> int:
        return self.end - self.first

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        for number in range(self.first, self.end):
            self.before(number)
            time.sleep(self.seconds_each)
            yield f"{number:016x}", encoded(gradient(number, self.size, self.size), quality=90)

    def before(self, number: int) -> None:
        """Called before an image is generated."""


@dataclasses.dataclass(frozen=True)
class KillingPart(GeneratedPart):
    """Kills the process that reads image `at`, `times` times; `folder` holds a mark for each kill."""

    folder: str = ""
    at: int = 0
    times: int = 1

    def before(self, number: int) -> None:
        if number == self.at and len(os.listdir(self.folder)) < self.times:
            Path(self.folder, f"mark-{time.time_ns()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class FailingPart(GeneratedPart):
    """Fails at image `at`."""

    at: int = 0

    def before(self, number: int) -> None:
        if number == self.at:
            raise OSError(5, "the disk of this part is broken")


@dataclasses.dataclass(frozen=True)
class ExclusivePart(GeneratedPart):
    """Fails if another one of the same folder is read at the same time."""

    folder: str = ""
    max_concurrent: int = 1
    hold_seconds: float = 0.3
    """How long it waits for another reader."""

    def __iter__(self) -> Iterator[tuple[str, bytes]]:
        mark, met = Path(self.folder, "reading"), Path(self.folder, "met")
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            met.touch()
            raise OSError(11, "another part is being read") from None
        end = time.monotonic() + self.hold_seconds
        while time.monotonic() < end and not met.exists():
            time.sleep(0.05)
        yield from super().__iter__()
        mark.unlink()


def generated_parts(images: int, parts: int, **options: float) -> list[GeneratedPart]:
    """Some images in parts of unequal sizes."""
    ends = [images * (i + 1) ** 2 // parts**2 for i in range(parts)]
    return [
        GeneratedPart(f"generated-{i}", first, end, **options)  # pyright: ignore[reportArgumentType]
        for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
