"""The emulator of csrc/cuda/emulation finds what it says it finds: each fault seeded, and shown."""

import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("fault_kernels.cpp")

# What is put into a right kernel, and a part of what must be said about it.
FAULTS = {
    "no_wait": "is read before anyone waited for the cp.async of fault_kernels.cpp",
    "no_barrier": "race: shared address",
    "copies_early": "is written and read by warp 0 with no barrier between",
    "no_warp_barrier": "race: shared address",
    "swapped_a": "wrong: c",
    "swapped_b": "wrong: c",
    "not_transposed": "wrong: c",
    "out_of_shared": "is out of bounds: the block has 16384",
    "out_of_global": "is out of bounds of every tensor",
    "unaligned": "is not a multiple of 4",
    "unaligned_copy": "cp.async from an unaligned address",
    "writes_input": "a is written, and is an input",
    "unwritten": "was never written",
    "one_warp_waits": "threads 0 to 31 wait for barrier 0 (fault_kernels.cpp",
    "other_barrier": "threads 32 to 63 wait for barrier 1 (fault_kernels.cpp",
    "arrives_early": "race: shared address",
    "never_waits": "race: shared address",
    "waits_elsewhere": "threads 0 to 31 have finished; threads 32 to 63 wait for barrier 4",
    "lane_missing": "lanes diverge",
}


@pytest.fixture(scope="module")
def program(compile_emulated):
    return compile_emulated("fault_kernels", [SOURCE])


def said(program, *arguments):
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def test_right_kernel_is_right(program):
    # 2 warps, 3 steps, 4 products of 16 along K, 4 tiles of 8 columns, each seen once by the counters.
    assert said(program, "right") == "right: mma 96, ldmatrix 72, cp.async 1536, ldmatrix conflicts 0\n"


def test_named_barrier_orders_memory(program):
    assert said(program, "handover") == "right: barriers 2\n"


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_found(program, fault):
    text = said(program, fault)
    assert FAULTS[fault] in text
    assert text.startswith("wrong") or "fault_kernels.cpp:" in text


def test_bank_conflicts_are_counted(program):
    # Rows of 128 bytes without a swizzle: the 8 rows of a matrix lie in the same banks.
    assert said(program, "no_swizzle").endswith(f"ldmatrix conflicts {72 * 4 * 7}\n")


def test_every_fault_is_tested(program):
    assert set(said(program).split()) == {*FAULTS, "right", "handover", "no_swizzle"}
