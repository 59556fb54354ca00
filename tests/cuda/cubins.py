"""What nvcc makes of the CUDA kernels, without a device: `python tests/cuda/cubins.py` writes the table
of docs/cuda.md."""

import importlib.util
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/cuda.md"
ARCHITECTURES = ("sm_80", "sm_90a")
FLAGS = ("-std=c++17", "-O3", "--expt-relaxed-constexpr", "-cubin", "-Xptxas=-v")
# Both versions of the table are written by this release: another one allots registers in another way.
RELEASE = "13.0"

_START, _END = "<!-- cubins -->\n", "<!-- end -->\n"


class Kernel(NamedTuple):
    """One instantiation of attention_fwd_kernel."""

    architecture: str
    type: str
    head_dim: int
    warps: int
    row_tiles: int
    keys: int
    stages: int
    options: bool
    registers: int
    spilled: int  # bytes stored and loaded

    @property
    def shared(self) -> int:
        """Bytes: the rows of q, and the ring of k and v."""
        return 2 * self.head_dim * (16 * self.warps * self.row_tiles + 2 * self.stages * self.keys)


def nvcc() -> str | None:
    return shutil.which("nvcc")


def release() -> str:
    text = subprocess.run([str(nvcc()), "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    assert found, text
    return found[1]


def disassembler() -> str | None:
    """nvdisasm, from the toolkit or from the one that Triton brings."""
    if (found := shutil.which("nvdisasm")) is not None:
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    path = Path(triton.origin).parent / "backends/nvidia/bin/nvdisasm"
    return str(path) if path.exists() else None


def compile_cubin(architecture: str, cubin: Path) -> list[Kernel]:
    """Compiles attention.cu, and reads what ptxas says of each kernel."""
    source = ROOT / "csrc/cuda/attention.cu"
    command = [str(nvcc()), *FLAGS, f"-arch={architecture}", str(source), "-o", str(cubin)]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    kernels = []
    for piece in log.split("Compiling entry function")[1:]:
        name = re.search(r"ConfigINS_3ptx\d+(\w\w\w\w)E" + r"Li(\d+)E" * 5 + r"Lb([01])E", piece)
        spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", piece)
        registers = re.search(r"Used (\d+) registers", piece)
        assert name and spills and registers, piece
        numbers = [int(x) for x in name.groups()[1:6]]
        spilled = int(spills[1]) + int(spills[2])
        kernels.append(Kernel(architecture, name[1], *numbers, name[7] == "1", int(registers[1]), spilled))
    return sorted(kernels)


def instructions(cubin: Path) -> dict[str, set[str]]:
    """The opcodes of each kernel, by its mangled name."""
    command = [str(disassembler()), "-c", str(cubin)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for piece in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.MULTILINE)[1:]:
        name = re.split(r"[\s,]", piece, maxsplit=1)[0]
        found[name] = set(re.findall(r"\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)", piece))
    return found


def table(kernels: list[Kernel]) -> str:
    """The table of docs/cuda.md, in Markdown. bf16 and fp16 are compiled alike."""
    lines = [
        "| head dim | options | warps | rows | keys | stages | shared memory | "
        + " | ".join(f"registers, {x}" for x in ARCHITECTURES)
        + " |",
        "|" + "---|" * (7 + len(ARCHITECTURES)),
    ]
    shapes = sorted({(*x[2:7], x.options) for x in kernels}, key=lambda x: (x[5], x))
    for shape in shapes:
        same = [x for x in kernels if (*x[2:7], x.options) == shape]
        row = [shape[0], "all" if shape[5] else "window, sinks", shape[1], 16 * shape[1] * shape[2]]
        row += [shape[3], shape[4], f"{same[0].shared / 1024:g} KB"]
        for architecture in ARCHITECTURES:
            row.append(max(x.registers for x in same if x.architecture == architecture))
        lines.append("| " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def table_on_page() -> str:
    return PAGE.read_text().split(_START)[1].split(_END)[0]


def main() -> None:
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for architecture in ARCHITECTURES:
            kernels += compile_cubin(architecture, Path(folder, "attention.cubin"))
    page = PAGE.read_text()
    PAGE.write_text(page.split(_START)[0] + _START + table(kernels) + _END + page.split(_END)[1])


if __name__ == "__main__":
    main()
