"""Images of a bucket that are known by their keys, so that nothing has to be listed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from paml import storage
from paml.errors import DataError
from paml.reading import inside
from paml.sources.fetch import THREADS, read_ahead, read_object
from paml.sources.parts import Part, Payload, mark_of, starts


@dataclass(frozen=True)
class BucketPart:
    """Some wanted keys of a bucket."""

    name: str
    folder: str
    keys: tuple[str, ...]
    suffix: str
    threads: int
    bytes: None = None

    @property
    def images(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[tuple[str, Payload]]:
        yield from read_ahead(self.keys, self._read, self.threads)

    def _read(self, key: str) -> Payload:
        try:
            path = inside(self.folder, key + self.suffix)
        except ValueError as error:
            return DataError(str(error))
        return read_object(path)


def bucket_parts(
    prefix: str,
    keys: Iterable[str],
    split: str,
    per_part: int = 2000,
    *,
    suffix: str = ".jpg",
    threads: int = THREADS,
) -> list[Part]:
    """The images `{prefix}/{split}/{key}{suffix}` of the wanted keys, in parts of `per_part`, ordered by key.

    prefix: `s3://bucket` or `s3://bucket/folder`, or a local folder. Access is by the AWS variables, the
    machine's role, or anonymous without either. Each part has at most `threads` requests under way. A key that
    the bucket has not is given with a FileNotFoundError; storage that cannot tell raises StorageError while the
    part is read. (Where a bucket denies listing, S3 calls absent objects denied: that is such an error.)
    """
    if threads < 1:
        raise ValueError(f"threads is {threads}; at least 1 must read: set {THREADS}")
    folder = storage.join(prefix, split)
    wanted = sorted(set(keys))
    parts: list[Part] = []
    for number, start in enumerate(starts(len(wanted), per_part)):
        run = tuple(wanted[start : start + per_part])
        parts.append(BucketPart(f"keys-{number:06d}-{mark_of([folder, suffix, *run])}", folder, run, suffix, threads))
    return parts
