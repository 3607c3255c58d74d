"""Image keys as text and as numbers: a key of 16 lower-case hex digits is stored as uint64, any other as a string."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from paml.errors import LabelError

_HEX_BLOCK = 1 << 15  # digits of so many keys fit into the cache


def as_array(values: Any) -> pa.Array:
    """One Arrow array of a sequence, an Arrow array or a chunked one."""
    if isinstance(values, pa.ChunkedArray):
        return pa.concat_arrays(values.chunks) if values.num_chunks else pa.array([], values.type)
    if isinstance(values, pa.Array):
        return values
    try:
        return pa.array(values)
    except pa.ArrowException as error:
        raise LabelError(f"the values have several types or no single axis ({error}): pass a flat list") from error


def as_strings(keys: Any) -> pa.Array:
    """string[n] of a sequence of keys, an Arrow array or a chunked one."""
    array = as_array(keys)
    return array if pa.types.is_string(array.type) else array.cast(pa.string())


def as_text(keys: pa.Array) -> pa.Array:
    """string[n] of keys as a table stores them."""
    return uint64_to_hex(keys.to_numpy()) if pa.types.is_uint64(keys.type) else keys


def as_stored(keys: pa.Array) -> pa.Array:
    """Keys as a table stores them: uint64 if all are hex, else unchanged. Keeps the order."""
    if pa.types.is_uint64(keys.type):
        return keys
    values, valid = hex_to_uint64(keys)
    return pa.array(values) if valid.all() else keys


def words_to_uint64(words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values uint64[n], valid bool[n]) of 16 hex digits each, given as two little-endian words uint64[n, 2].

    Valid are digits and the letters a to f. The arithmetic handles the 8 characters of a word at once.
    """
    halves, wrong = [], np.zeros(len(words), np.uint64)
    for text in np.ascontiguousarray(words.T):
        digits = (text >> np.uint64(6)) & np.uint64(0x0101010101010101)  # 1 for a letter
        digits *= np.uint64(9)
        digits += text & np.uint64(0x0F0F0F0F0F0F0F0F)
        # A character is valid if its digit is below 16 and encodes to the same character.
        wrong |= digits & np.uint64(0xF0F0F0F0F0F0F0F0)
        encoded = (digits + np.uint64(0x0606060606060606)) >> np.uint64(4)
        encoded &= np.uint64(0x0101010101010101)
        encoded *= np.uint64(0x27)
        encoded += digits
        encoded += np.uint64(0x3030303030303030)
        wrong |= encoded ^ text
        # Pack the digits into bytes, then pairs, then the word, whose first digit is the most significant.
        digits = ((digits << np.uint64(4)) | (digits >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        digits = (digits | (digits >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        halves.append((digits | (digits >> np.uint64(16))) & np.uint64(0xFFFFFFFF))
    values = halves[1] << np.uint64(32)
    values |= halves[0]
    return values.byteswap(inplace=True), wrong == 0


def hex_to_uint64(keys: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(values uint64[n], valid bool[n]): valid are keys of exactly 16 lower-case hex digits."""
    count = len(keys)
    if count == 0:
        return np.zeros(0, np.uint64), np.zeros(0, bool)
    _, offset_buffer, data_buffer = keys.buffers()
    offset_type = np.int64 if pa.types.is_large_string(keys.type) else np.int32
    offsets = np.frombuffer(offset_buffer, offset_type, count + 1, keys.offset * np.dtype(offset_type).itemsize)
    text = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    valid = np.diff(offsets) == 16
    if keys.null_count:
        valid &= keys.is_valid().to_numpy(zero_copy_only=False)
    if valid.all():
        digits = text[offsets[0] : offsets[-1]].reshape(count, 16)
    else:
        digits = np.zeros((count, 16), np.uint8)
        digits[valid] = text[offsets[:-1][valid][:, None] + np.arange(16)]
    values = np.empty(count, np.uint64)
    for start in range(0, count, _HEX_BLOCK):
        part = slice(start, start + _HEX_BLOCK)
        values[part], all_hex = words_to_uint64(digits[part].view("<u8"))
        valid[part] &= all_hex
    return values, valid


def uint64_to_hex(values: np.ndarray) -> pa.Array:
    """string[n]: the 16 lower-case hex digits of each of uint64[n]."""
    pairs = np.ascontiguousarray(values).astype(">u8").view(np.uint8).reshape(-1, 8)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.stack([digits[pairs >> 4], digits[pairs & 15]], axis=2)
    offsets = np.arange(len(values) + 1, dtype=np.int32) * 16
    return pa.Array.from_buffers(pa.string(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(text.tobytes())])


def approximate_argsort(values: np.ndarray) -> np.ndarray:
    """int64[n]: an order in which uint64[n] ascend, except for values that differ in their last bits only.

    Value and position are packed into one number as far as they fit: numpy sorts numbers several times faster than
    it computes an argsort.
    """
    if len(values) < 2:
        return np.arange(len(values))
    low = values.min()
    position_bits = (len(values) - 1).bit_length()
    packed = values - low
    packed >>= np.uint64(max(0, int(values.max() - low).bit_length() + position_bits - 64))
    packed <<= np.uint64(position_bits)
    packed |= np.arange(len(values), dtype=np.uint64)
    packed.sort()
    packed &= np.uint64((1 << position_bits) - 1)
    return packed.view(np.int64)


def rank_texts(texts: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """(uint64[n], large_string[u]): the rank of each text among the u distinct ones, and these in ascending order."""
    coded = texts.cast(pa.large_string()).dictionary_encode()
    order = pc.call_function("array_sort_indices", [coded.dictionary]).to_numpy().astype(np.int64)
    rank = np.empty(len(order), np.uint64)
    rank[order] = np.arange(len(order))
    return rank[coded.indices.to_numpy()], coded.dictionary.take(pa.array(order))


def sort_keys(keys: Sequence[str] | pa.Array) -> tuple[pa.Array, np.ndarray]:
    """(stored keys in ascending order, int64[n] that order): the key column of a table of these images.

    Raises LabelError if a key is empty or repeats.
    """
    strings = as_strings(keys)
    check_not_empty(strings)
    values, valid = hex_to_uint64(strings)
    if valid.all():
        order = np.argsort(values, kind="stable")
        stored: pa.Array = pa.array(values[order])
        repeated = values[order][1:] == values[order][:-1]
    else:
        order = pc.call_function("array_sort_indices", [strings]).to_numpy().astype(np.int64)
        stored = strings.take(pa.array(order))
        repeated = pc.call_function("equal", [stored[1:], stored[:-1]]).to_numpy(zero_copy_only=False)
    if repeated.any():
        key = strings[int(order[np.flatnonzero(repeated)[0]])].as_py()
        raise LabelError(f"key {key!r} is a duplicate: list each image once, merge its labels first")
    return stored, order


def check_not_empty(keys: pa.Array) -> None:
    """Raise LabelError if a key is null or has no character."""
    if keys.null_count or (len(keys) and pc.call_function("binary_length", [keys]).to_numpy().min() == 0):
        raise LabelError("a key is empty: give every image a key of one character or more")
