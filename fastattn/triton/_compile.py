"""Compiles kernels for cards that are not here, and says what came of it.

`python -m fastattn.triton._compile` prints the table of docs/triton.md.

Every op's file has `compilations(architecture)`, which lists its kernels with each of their configurations.
Triton compiles for any card; what counts is then read from the code of the card itself.
"""

import importlib
import multiprocessing
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

# The architectures whose configurations exist, and the shared memory of a program there in bytes.
ARCHITECTURES = {"sm80": 163 << 10, "sm89": 99 << 10, "sm90": 227 << 10}

_TENSOR_CORES = re.compile(r"\b(wgmma\.mma_async|mma)\.sync")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


class Compilation(NamedTuple):
    """One kernel with one configuration."""

    name: str  # in the table
    kernel: Any
    arguments: dict[str, Any]  # "*bf16", "i64", "i32:16" (a multiple of 16); what a constexpr is; None
    num_warps: int
    num_stages: int = 1
    matrix: bool = False  # whether tensor cores must do the work


class Report(NamedTuple):
    """What became of it."""

    op: str
    kernel: str
    name: str
    architecture: str
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    spilled: int  # bytes of a thread that did not fit them
    shared: int  # bytes of a program
    instructions: str  # of the tensor cores: how many, and which
    matrix: bool
    rows: int  # of a tile


def ops() -> list[str]:
    """The ops of this backend."""
    names = (module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)]))
    return [name for name in names if not name.startswith("_")]


def all_reports(architectures: tuple[str, ...] = ("sm80", "sm90"), processes: int = 2) -> list[Report]:
    """Compiles everything. Triton keeps what it compiled in its own cache."""
    tasks = [
        (op, architecture, at)
        for op in ops()
        for architecture in architectures
        for at in range(len(list(_listed(op, architecture))))
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        return list(pool.map(_report, tasks))


def _listed(op: str, architecture: str) -> Iterator[Compilation]:
    found: Iterator[Compilation] = importlib.import_module(f"fastattn.triton.{op}").compilations(architecture)
    return found


def _report(task: tuple[str, str, int]) -> Report:
    op, architecture, at = task
    wanted = list(_listed(op, architecture))[at]
    code = compiled(wanted, architecture)
    registers, stack, local = _usage(code.asm["cubin"])
    found = [match[1] for match in _TENSOR_CORES.finditer(code.asm["ptx"])]
    names = {name: found.count(name) for name in sorted(set(found))}
    return Report(
        op, wanted.kernel.__name__, wanted.name, architecture, wanted.num_warps, wanted.num_stages,
        registers, stack + local, code.metadata.shared,
        ", ".join(f"{count} {name.split('.')[0]}" for name, count in names.items()), wanted.matrix,
        wanted.arguments.get("ROWS", 0),
    )  # fmt: skip


def compiled(wanted: Compilation, architecture: str) -> Any:
    """The kernel as Triton compiles it for an architecture: `asm` and `metadata`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def described(given: Any, path: tuple[int, ...], is_constexpr: bool) -> Any:
        if isinstance(given, tuple) and not is_constexpr:
            parts = [described(part, (*path, at), False) for at, part in enumerate(given)]
            return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)
        if is_constexpr or given is None or isinstance(given, int):
            constexprs[path] = given
            return "constexpr"
        kind, _, multiple = given.partition(":")
        if kind.startswith("*") or multiple:
            attributes[path] = [["tt.divisibility", 16]]
        return kind

    for at, parameter in enumerate(wanted.kernel.params):
        signature[parameter.name] = described(wanted.arguments[parameter.name], (at,), parameter.is_constexpr)
    if unknown := set(wanted.arguments) - set(signature):
        raise ValueError(f"{wanted.kernel.__name__} has no parameters {sorted(unknown)}")
    source = ASTSource(wanted.kernel, signature, constexprs, attributes)
    options = {"num_warps": wanted.num_warps, "num_stages": wanted.num_stages}
    return compile(source, target=GPUTarget("cuda", int(architecture[2:]), 32), options=options)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, stack and local memory of a thread, as cuobjdump of the wheel reads them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if (found := _USAGE.search(said)) is None:
        raise RuntimeError(f"cuobjdump names no resources: {said}")
    return int(found[1]), int(found[2]), int(found[3])


def table(reports: list[Report]) -> str:
    """The reports in Markdown, a line for each kernel, configuration and architecture."""
    head = "op | kernel | case | card | warps | stages | registers | spilled | shared | tensor cores"
    lines = [f"| {head} |", f"|{' --- |' * 4}{' ---: |' * 5} --- |"]
    for r in reports:
        cells = (
            f"`{r.op}`", f"`{r.kernel}`", r.name, r.architecture, r.num_warps, r.num_stages, r.registers,
            r.spilled, r.shared, r.instructions or "none",
        )  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table(all_reports()) + "\n")
