"""What nvcc makes of the CUDA kernels: spills, registers, shared memory, instructions."""

import cubins
import pytest

pytestmark = pytest.mark.skipif(cubins.nvcc() is None, reason="there is no nvcc")

# Every device since sm_80 gives a block that much: sm_86 and sm_89 no more.
SHARED_BYTES = 99 * 1024
REGISTERS = 65536  # of a multiprocessor


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Each architecture's cubin and kernels."""
    folder = tmp_path_factory.mktemp("cubins")
    found = {}
    for architecture in cubins.ARCHITECTURES:
        cubin = folder / f"{architecture}.cubin"
        found[architecture] = cubin, cubins.compile_cubin(architecture, cubin)
    return found


@pytest.fixture(scope="module")
def kernels(compiled):
    return [kernel for _, some in compiled.values() for kernel in some]


def test_all_are_there(kernels):
    # Two types, five widths, with and without options.
    assert len(kernels) == 2 * 5 * 2 * len(cubins.ARCHITECTURES)
    assert {x.head_dim for x in kernels} == {64, 96, 128, 192, 256}


def test_nothing_is_spilled(kernels):
    assert not [x for x in kernels if x.spilled]


def test_blocks_fit(kernels):
    assert not [x for x in kernels if x.shared > SHARED_BYTES]
    assert not [x for x in kernels if x.registers * 32 * x.warps > REGISTERS]


@pytest.mark.parametrize("architecture", cubins.ARCHITECTURES)
def test_instructions_are_those_meant(compiled, architecture):
    if cubins.disassembler() is None:
        pytest.skip("there is no nvdisasm")
    cubin, kernels = compiled[architecture]
    found = cubins.instructions(cubin)
    assert len(found) == len(kernels)
    for name, opcodes in found.items():
        missing = {"HMMA", "LDSM", "LDGSTS", "LDGDEPBAR", "MUFU"} - opcodes
        assert not missing, f"{name} has no {missing}"
        assert not {"LDL", "STL"} & opcodes, f"{name} keeps something in local memory"


def test_page_is_current(kernels):
    if cubins.release() != cubins.RELEASE:
        pytest.skip(f"the table was made by nvcc {cubins.RELEASE}")
    assert cubins.table(kernels) == cubins.table_on_page(), "run python tests/cuda/cubins.py"
