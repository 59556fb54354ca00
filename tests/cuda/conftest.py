"""Compiles the emulated CUDA kernels, once for each state of the sources."""

import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EMULATOR = sorted((ROOT / "csrc/cuda/emulation").glob("*.cpp"))


@pytest.fixture(scope="session")
def compile_emulated() -> Callable[..., Path]:
    """compile_emulated(name, sources, flags): the program or library, with the emulator in it."""
    named = shlex.split(os.environ.get("CXX", ""))
    compiler = named or [next(filter(shutil.which, ("c++", "g++", "clang++")), "")]
    if not compiler[0]:
        pytest.skip("there is no C++ compiler")

    def run(
        name: str, sources: Sequence[Path], flags: Sequence[str] = (), folder: Path | None = None
    ) -> Path:
        command = [*compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
        command += [part for x in (*sources, *EMULATOR) for part in ("-x", "c++", str(x))]
        if folder is not None:  # sources of its own, used once
            subprocess.run([*command, "-o", str(folder / name)], check=True)
            return folder / name
        digest = hashlib.sha256("\0".join(command).encode())
        for path in sorted([*sources, *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/*.cpp")]):
            digest.update(path.read_bytes())
        for path in sorted(x for x in (ROOT / "csrc/cuda").rglob("*") if x.is_file()):
            digest.update(path.read_bytes())
        folder = ROOT / "build" / "emulation" / digest.hexdigest()[:16]
        target = folder / name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([*command, "-o", str(folder / "new")], check=True)
            (folder / "new").replace(target)
        return target

    return run
