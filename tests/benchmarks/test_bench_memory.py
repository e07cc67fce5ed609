"""Peak memory, against allocations whose size is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2det.tools.measuring import memory

ROOT = Path(memory.__file__).parents[3]
MIB = 1 << 20
# Each takes 32 MiB at its peak; in MiB, what is left over.
PROGRAM = """
import ctypes, json
import torch
from d2det.tools.measuring import memory
memory.prepare_process()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
KIB = 1024

def tensor(kib):
    return torch.empty(kib * KIB, dtype=torch.uint8).fill_(1)

def from_torch():
    tensor(32 * KIB)

def one_after_the_other():
    for _ in range(4):
        tensor(32 * KIB)

def together():
    kept = [tensor(256) for _ in range(128)]

def by_malloc():
    address = libc.malloc(32 * KIB * KIB)
    libc.memset(address, 1, 32 * KIB * KIB)
    libc.free(address)

def with_a_result():
    scratch = tensor(32 * KIB)
    return tensor(8 * KIB), tensor(8 * KIB)[: KIB]

def nothing():
    return tensor(16 * KIB)

inputs = tensor(64 * KIB)
calls = (from_torch, one_after_the_other, together, by_malloc, with_a_result, nothing)
for call in calls:
    call()
print(json.dumps({call.__name__: memory.peak(call, "cpu") for call in calls}))
"""


@pytest.fixture(scope="module")
def peaks() -> dict[str, int]:
    if reason := memory.unavailable("cpu"):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, **memory.ENVIRONMENT},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "call", ["from_torch", "one_after_the_other", "together", "by_malloc", "with_a_result"]
)
def test_a_known_allocation_is_seen(peaks, call):
    assert peaks[call] == pytest.approx(32 * MIB, abs=MIB)


def test_inputs_and_results_do_not_count(peaks):
    assert peaks["nothing"] < MIB


@pytest.mark.gpu
def test_a_known_allocation_is_seen_on_a_gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")

    def call() -> torch.Tensor:
        scratch = torch.ones(32 * MIB, dtype=torch.uint8, device="cuda")
        return scratch[:MIB].clone()

    assert memory.peak(call, "cuda") == pytest.approx(32 * MIB, abs=MIB // 2)
