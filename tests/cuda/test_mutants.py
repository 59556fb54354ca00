"""The attention kernel with one thing changed at a time: the emulator or the result must show it."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("mutant_driver.cpp")

WRONG = "another result"

# File, text, what stands there instead, and what is said. One of each kind of fault.
MUTANTS = {
    "no_wait": ("attention_sm80.cuh", "ptx::cp_async_wait<C::kStages - 2>();", "", "poison"),
    "waits_for_one_less": ("attention_sm80.cuh", "wait<C::kStages - 2>", "wait<C::kStages - 1>", "poison"),
    "no_barrier": ("attention_sm80.cuh", "ptx::sync_block(C::kThreads);", "", "race"),
    "barrier_of_a_warp": ("attention_sm80.cuh", "sync_block(C::kThreads)", "sync_block(32)", "race"),
    "one_stage": ("attention_sm80.cuh", "index % C::kStages", "0 * index", "poison"),
    "no_warp_barrier": ("attention_sm80.cuh", "  ptx::sync_warp();\n  for", "  for", "race"),
    "not_transposed": ("tile_sm80.cuh", "ldmatrix_x4_trans", "ldmatrix_x4", WRONG),
    "operands_swapped": ("attention_sm80.cuh", "a[r], b[0], b[1]);", "a[r], b[1], b[0]);", WRONG),
    "no_last_key": ("tile_sm80.cuh", "first + row < x.rows && ", "", "out of bounds"),
    "no_last_row": ("attention_sm80.cuh", "i >= p.seqlen_q || 8 * chunk", "8 * chunk", "out of bounds"),
    "no_rescale": ("softmax.cuh", "out[r][d][2 * half] *= shrink;", "", WRONG),
    "no_mask": ("mask.cuh", "if (j < begin || j >= end)", "if (j < begin)", WRONG),
}


@pytest.fixture
def result(compile_emulated, tmp_path):
    """What the driver says after a text of a file was replaced by another."""

    def run(file, text, instead):
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        path = tmp_path / "csrc/cuda" / file
        source = path.read_text()
        assert text in source
        path.write_text(source.replace(text, instead))
        program = compile_emulated("mutant", [DRIVER], ["-I", str(tmp_path)], tmp_path)
        return subprocess.run([program], check=True, capture_output=True, text=True).stdout

    return run


@pytest.fixture(scope="module")
def right(compile_emulated):
    program = compile_emulated("unchanged", [DRIVER], ["-I", str(ROOT)])
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_found(result, right, mutant):
    *change, said = MUTANTS[mutant]
    found = result(*change)
    assert right.startswith("out: ")
    if said == WRONG:
        assert found.startswith("out: ") and found != right
    else:
        assert found.startswith("fault: ") and said in found
