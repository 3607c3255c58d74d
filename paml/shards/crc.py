"""CRC-32 of every image that is read: ISA-L's by the processor's own instructions, five times as fast as zlib's."""

try:
    from isal.isal_zlib import crc32 as crc32_of
except ImportError:  # a machine that holds torch alone, or a processor that ISA-L knows nothing of
    from zlib import crc32 as crc32_of

__all__ = ["crc32_of"]
