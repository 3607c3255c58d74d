"""A CPU run retains freed memory: allocations of the same sizes cost no page faults."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from paml.training.allocator import retain_freed_memory

if sys.argv[1] == "retained":
    assert retain_freed_memory()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    before = faults()
    torch.ones(16 << 20)  # 64 MB, more than glibc retains by default
    return faults() - before

print([step() for _ in range(40)][-1])  # the heap needs some ten steps to settle
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_reused():
    counts = {
        mode: int(
            subprocess.run([sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True).stdout
        )
        for mode in ("retained", "returned")
    }
    assert counts["retained"] < 100 < counts["returned"]
