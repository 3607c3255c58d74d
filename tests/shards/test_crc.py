import zlib

from hypothesis import given
from hypothesis import strategies as st

from paml.shards.crc import crc32_of


@given(st.binary(max_size=5000), st.sampled_from([bytes, bytearray, memoryview]))
def test_is_the_crc_32_of_every_tar_and_zip_tool(data: bytes, kind: type) -> None:
    assert crc32_of(kind(data)) == zlib.crc32(data)
