"""A CPU run keeps its memory: after the first pass the same sizes cost no page faults."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from paml.training.allocator import keep_memory

if sys.argv[1] == "kept":
    assert keep_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    before = faults()
    torch.ones(16 << 20)  # 64 MB, more than glibc ever learns to keep by itself
    return faults() - before

print([step() for _ in range(40)][-1])  # the heap takes some ten steps to find its place
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_used_again_without_the_system():
    counts = {
        way: int(
            subprocess.run([sys.executable, "-c", PROGRAM, way], check=True, capture_output=True, text=True).stdout
        )
        for way in ("kept", "returned")
    }
    assert counts["kept"] < 100 < counts["returned"]
