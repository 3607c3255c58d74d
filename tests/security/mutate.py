"""Inputs for parsers: valid ones, changed at random and at sensitive positions by a seeded generator."""

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

TOKENS = (
    b"", b"\0", b"\n", b"\r", b"\r\n", b'"', b'""', b",", b";", b"'", b"\t", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf",
    b"../", b"/etc/passwd", b"=1+1", b"-1", b"0", b"1e999", b"nan", b"inf", b"9" * 40, b"{", b"[" * 50, b"null",
    "\u202e".encode(), "\U0001f600".encode(), b"\xed\xa0\x80", b"%s%n", b"${x}", b"{{7*7}}", b"0x7fffffff",
)  # fmt: skip
NUMBERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 1.5, float("nan"), float("inf"), 1e308, "",
    "x", "\0", "../../x", "/etc/passwd", "s3://b/k", "9" * 30, "\ud800", "step-000000001", [], {}, [[]], {"": {}},
    [None] * 9, {"size": -1}, "é" * 300,
)  # fmt: skip


def changed(rng: random.Random, data: bytes, others: Sequence[bytes] = (), most: int = 6) -> bytes:
    """`data` after one to `most` changes of bits, bytes, numbers or tokens, or of parts dropped, repeated or moved."""
    text = bytearray(data)
    for _ in range(rng.randint(1, most)):
        size = len(text)
        at = rng.randrange(size + 1)
        kind = rng.randrange(11)
        if kind == 0 and size:
            text[at % size] ^= 1 << rng.randrange(8)
        elif kind == 1 and size:
            text[at % size] = rng.randrange(256)
        elif kind == 2:
            text[at:at] = rng.choice(TOKENS)
        elif kind == 3:
            text[at : at + len(token)] = (token := rng.choice(TOKENS))
        elif kind == 4:
            del text[at : at + rng.choice((1, 2, 4, 8, rng.randrange(size + 1)))]
        elif kind == 5 and size:
            piece = text[at : at + rng.randrange(1, 65)]
            text[at:at] = piece * rng.choice((1, 1, 2, 50))
        elif kind == 6 and size > 1:
            to = rng.randrange(size)
            piece = bytes(text[at : at + rng.randrange(1, 33)])
            text[to : to + len(piece)] = piece
        elif kind == 7 and size >= 8:
            width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
            number = rng.choice(NUMBERS) if rng.random() < 0.7 else rng.getrandbits(64)
            at = rng.randrange(size - 7)
            text[at : at + width] = (number % (1 << (8 * width))).to_bytes(width, order)
        elif kind == 8 and others:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            text[at:] = other[start:]
        elif kind == 9 and size and rng.random() < 0.2:
            del text[at:]
        elif kind == 10:
            text[at:at] = rng.randbytes(rng.randrange(1, 17))
    return bytes(text)


def changed_json(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three parts replaced, dropped, renamed or duplicated."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        places: list[tuple[Any, Any]] = []
        _places(value, places)
        if not places:
            return copy.deepcopy(rng.choice(ODD_VALUES))
        inside, key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            del inside[key]
        elif kind == 1 and isinstance(inside, dict):
            inside[rng.choice(("", "..", "x", "../../x", "/x", str(key) + "x"))] = inside.pop(key)
        elif kind == 2 and isinstance(inside, list):
            inside.extend(copy.deepcopy(inside[:3]))
        elif kind == 3 and isinstance(inside[key], int | float):
            inside[key] = inside[key] * rng.choice((-1, 2, 2**20, 2**40, 0.5)) + rng.choice((-1, 0, 1))
        elif kind == 4:
            deep: Any = inside[key]
            for _ in range(rng.choice((1, 3, 40))):
                deep = [deep] if rng.random() < 0.5 else {"x": deep}
            inside[key] = deep
        else:
            inside[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    return value


def json_bytes(rng: random.Random, value: Any) -> bytes:
    """A changed JSON value as text; sometimes the text is changed too, or nested deeper than Python's stack."""
    if rng.random() < 0.002:
        return b"[" * 100_000
    text = json.dumps(changed_json(rng, value)).encode()
    return changed(rng, text) if rng.random() < 0.3 else text


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        _places(inner, found)


def changed_tar(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A tar with changed header fields and valid checksums, or with random changes."""
    text = bytearray(data)
    if rng.random() < 0.75:
        for _ in range(rng.randint(1, 3)):
            at = 512 * rng.randrange(max(1, len(text) // 512))
            header = text[at : at + 512]
            if len(header) < 512:
                break
            start, size = rng.choice(
                ((0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155))
            )
            kind = rng.randrange(5)
            if kind == 0:
                field = rng.randbytes(size)
            elif kind == 1:
                field = b"\x80" + rng.choice(NUMBERS).to_bytes(size - 1, "big") if size > 8 else b"\xff" * size
            elif kind == 2:
                field = b"\xff" * (size - 1) + bytes([rng.randrange(256)])
            elif kind == 3:
                field = rng.choice(
                    (b"7" * size, b"0000000200\0\0", b"00000000000\0", b"../../x.jpg", b"/etc/x.jpg", b"")
                )
            else:
                field = bytes([rng.choice(b"0123456789xgLKSVMND\0")]) * size
            header[start : start + size] = field[:size].ljust(size, b"\0")
            header[148:156] = b"        "
            header[148:156] = b"%06o\0 " % (sum(header) & 0o777777)
            text[at : at + 512] = header
        if rng.random() < 0.7:
            return bytes(text)
    return changed(rng, bytes(text), others)


def changed_png(rng: random.Random, data: bytes) -> bytes:
    """A PNG with changed chunk content and a valid CRC."""
    at, out, chosen = 8, bytearray(data[:8]), rng.randrange(4)
    number = 0
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        if number == chosen:
            body = changed(rng, body)
        out += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        at, number = at + 12 + size, number + 1
    return bytes(out)


def with_checksum(data: bytes) -> bytes:
    """A changed Arrow file with a valid checksum, as an attacker would write it."""
    from paml import checksum

    start = data.rfind(checksum._PREFIX)
    old = data[start : start + len(checksum._BLANK)]
    if start < 0 or len(old) < len(checksum._BLANK):
        return data
    text = bytearray(data)
    places = checksum._find(memoryview(data), old)
    new = checksum._PREFIX + checksum._digest(memoryview(data), places).encode()
    for place in places:
        text[place : place + len(new)] = new
    return bytes(text)


def chooser(seeds: Sequence[bytes], change: Callable[[random.Random, bytes, Sequence[bytes]], bytes] | None = None):
    """A function that derives an input from a random seed file."""

    def make(rng: random.Random) -> bytes:
        chosen = rng.choice(seeds)
        return changed(rng, chosen, seeds) if change is None else change(rng, chosen, seeds)

    return make
