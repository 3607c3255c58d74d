"""Match the images that labels name to the files that exist: by path, then by key. Nothing is guessed."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from paml.errors import DataError
from paml.sources.folder import is_image, key_of
from paml.sources.parts import KeyRule

_SHOWN = 3


def normalize_name(name: str) -> str:
    """An image's name with forward slashes, in Unicode's composed form, without a leading `./` or `/`."""
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    while name.startswith(("./", "/")):
        name = name[2:] if name.startswith("./") else name[1:]
    return name


def label_key(name: str, rule: KeyRule) -> str:
    """The key of an image that a label names, with or without folders and an image suffix."""
    name = normalize_name(name)
    if is_image(name):
        return key_of(name, rule)
    return name.rsplit("/", 1)[-1] if rule == "name" else name


def file_key(name: str, rule: KeyRule) -> str:
    """The key of a file, given its path below the folder of the images."""
    return key_of(normalize_name(name), rule)


@dataclass(frozen=True)
class Matching:
    """The file of each image that labels name."""

    files: dict[str, str]
    """The path of the file by the image's key, for the images that have one."""
    missing: list[str]
    """The names of the others."""
    shadowed: list[tuple[str, str]]
    """(file, file that is used) of files with the key of a matched image that are not used: the label names another."""


def match_files(names: Sequence[str], keys: Sequence[str], files: Iterable[str], rule: KeyRule) -> Matching:
    """Match images, given by their names and keys, to files, given by their paths below the folder of the images.

    A label's path matches the file of this path, or of the path without its first folders. Otherwise the key decides;
    raises DataError if several files have it, or if two images match one file.
    """
    by_path: dict[str, str] = {}
    by_key: dict[str, list[str]] = {}
    by_base: dict[str, list[str]] = {}
    for file in files:
        by_path[path := normalize_name(file)] = file
        by_base.setdefault(path.rsplit("/", 1)[-1], []).append(file)
        by_key.setdefault(file_key(file, rule), []).append(file)
    matched: dict[str, str] = {}
    missing: list[str] = []
    shadowed: list[tuple[str, str]] = []
    image_of: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        candidates = by_key.get(key, [])
        path = normalize_name(name)
        file = _by_path(path, by_path, by_base.get(path.rsplit("/", 1)[-1], []))
        if file is None and len(candidates) > 1:
            raise DataError(_ambiguous(name, key, candidates))
        if file is None and not candidates:
            missing.append(name)
            continue
        file = file or candidates[0]
        if image_of.setdefault(file, name) != name:
            raise DataError(
                f"the labels' images {image_of[file]!r} and {name!r} both match the file {file!r}: set images to the "
                "folder that their paths start from"
            )
        matched[key] = file
        shadowed += [(other, file) for other in candidates if other != file]
    return Matching(matched, missing, shadowed)


def _by_path(name: str, by_path: dict[str, str], same_base: Sequence[str]) -> str | None:
    """The file of this path; the only one below further folders; or that of the path without its first folders.

    same_base: the files that have the name's last part.
    """
    if name in by_path:
        return by_path[name]
    below = [file for file in same_base if "/" in name and normalize_name(file).endswith(f"/{name}")]
    if len(below) == 1:
        return below[0]
    while name not in by_path:
        _, slash, name = name.partition("/")
        if not slash or (len(same_base) > 1 and "/" not in name):  # the bare name of several files says nothing
            return None
    return by_path[name]


def _ambiguous(name: str, key: str, files: Sequence[str]) -> str:
    return (
        f"{len(files)} files have the key {key!r} of the label's image {name!r}: {', '.join(files[:_SHOWN])}. Write "
        "the path of the right one in the labels, or set images to its folder, or rename one"
    )


def check_distinct(names: Sequence[str], keys: Sequence[str], path: str, rule: KeyRule) -> None:
    """Raise DataError if two images of the labels at `path` have the same key: their labels would be mixed."""
    name_of: dict[str, str] = {}
    for name, key in zip(names, keys, strict=True):
        first = name_of.setdefault(key, name)
        if first == name:
            continue
        paths = [label_key(each, "path") for each in (first, name)]
        fix = "rename one, or write an image's name in one way"
        if rule == "name" and paths[0] != paths[1]:
            fix = "set keys to 'path', or rename one"
        raise DataError(f"{path!r} has the images {first!r} and {name!r}, which have the same key {key!r}: {fix}")


_CHANGES: Sequence[tuple[str, Callable[[str], str]]] = (
    ("without '.0' at their end", lambda key: key.removesuffix(".0")),
    ("in lower case", str.lower),
    ("without leading zeros", lambda key: key.lstrip("0") or "0"),
    ("without blanks around them", str.strip),
    ("without their folders and suffix", lambda key: key_of(key, "name")),
)


def explain_missing(names: Sequence[str], keys: Sequence[str], available: Iterable[str]) -> str:
    """One example from each side of images that were not found, and the likely cause.

    names, keys: of the labels' images; available: keys of the files.
    """
    available = set(available)
    unmatched = [(name, key) for name, key in zip(names, keys, strict=True) if key not in available]
    if not unmatched:
        return ""
    name = unmatched[0][0]
    example = min(available - set(keys), default=min(available, default=None))
    text = f"the labels name images such as {name!r}, "
    text += "there is no file" if example is None else f"the files have keys such as {example!r}"
    for change, function in _CHANGES:
        changed = {function(key) for key in available}
        count = sum(function(key) in changed for _, key in unmatched)
        if count > len(unmatched) / 2:
            return f"{text}; {count:,} of {len(unmatched):,} would match {change}: correct the labels or the file names"
    return text
