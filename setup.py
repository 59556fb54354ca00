"""Builds the compiled core, fastattn._C: what pyproject.toml cannot say.

Ninja compiles csrc/ in build/core-*, which is kept between builds and knows each object's headers,
so an editable install rebuilds just what an edit touched. Nothing of torch is involved.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path

import pybind11
from ninja import BIN_DIR, ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# The CPU tiers: only csrc/cpu/isa_<tier>.cpp is compiled with these flags.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
TIERS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
}
X86 = platform.machine().lower() in ("x86_64", "amd64")

FLAGS = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
if X86:
    FLAGS.append("-DFASTATTN_X86=1")  # all tiers exist, not just generic

NO_COMPILER = """
********************************************************************************
fastattn: NO C++ COMPILER FOUND. Installing without the compiled core: fastattn
imports, but its CPU kernels are missing. Install g++ or clang++ (or name one in
CXX) and install fastattn again.
********************************************************************************
"""


def find_compiler():
    """The command in $CXX, else the first C++ compiler on the PATH, else None."""
    if named := shlex.split(os.environ.get("CXX", "")):
        if shutil.which(named[0]) is None:
            raise SystemExit(f"fastattn: CXX={shlex.join(named)!r} is not a command")
        return named
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def openmp_flags(compiler):
    """-fopenmp where it compiles and links; without it the core runs on one thread."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, "-fopenmp", str(source), "-o", str(source.with_suffix(""))]
        works = subprocess.run(command, capture_output=True).returncode == 0
    return ["-fopenmp"] if works else []


def sources():
    """Each source and the flags that are its own."""
    python = [sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    include = [f"-isystem{path}" for path in dict.fromkeys([*python, pybind11.get_include()])]
    for path in sorted(ROOT.glob("csrc/*.cpp")):
        yield path, include
    for path in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        tier = path.stem.removeprefix("isa_")
        if tier == path.stem:
            yield path, []
        elif X86 or tier == "generic":
            yield path, TIERS[tier]


def write_ninja(folder, library, compiler):
    """Writes build.ninja into the folder, where the objects go too."""
    openmp = openmp_flags(compiler)
    compile_flags = [*FLAGS, *openmp, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link_flags = [*openmp, *shlex.split(os.environ.get("LDFLAGS", ""))]
    if sys.platform == "darwin":
        link_flags += ["-undefined", "dynamic_lookup"]
    with open(folder / "build.ninja", "w") as file:
        ninja = ninja_syntax.Writer(file, width=1000)
        ninja.variable("cxx", shlex.join(compiler))
        ninja.variable("cxxflags", shlex.join(compile_flags))
        ninja.variable("ldflags", shlex.join(link_flags))
        ninja.rule(
            "compile",
            "$cxx $cxxflags $flags -MMD -MF $out.d -c $in -o $out",
            description="compile $in",
            depfile="$out.d",
            deps="gcc",
        )
        ninja.rule("link", "$cxx -shared $in -o $out $ldflags", description="link $out")
        objects = []
        for path, flags in sources():
            name = path.relative_to(ROOT).with_suffix(".o")
            flags = {"flags": shlex.join(flags)}
            objects += ninja.build(str(name), "compile", str(path), variables=flags)
        ninja.build(library, "link", objects)


class BuildCore(build_ext):
    """Runs ninja: setuptools' own compiling knows neither headers nor flags for one file."""

    def run(self):
        if find_compiler() is None:
            print(NO_COMPILER, file=sys.stderr)
            self.extensions = []
        super().run()

    def build_extension(self, ext):
        tag = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        if flags := os.environ.get("CXXFLAGS"):  # other flags, other objects
            tag += f"-{zlib.crc32(flags.encode()):08x}"
        folder = ROOT / "build" / f"core-{tag}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        write_ninja(folder, target.name, find_compiler())
        if subprocess.run([Path(BIN_DIR, "ninja"), "-C", folder]).returncode != 0:
            raise SystemExit("fastattn: the compiled core does not build; the errors stand above")
        self.mkpath(str(target.parent))
        self.copy_file(str(folder / target.name), str(target))


def relative(pattern):
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


setup(
    ext_modules=[
        Extension("fastattn._C", sources=relative("csrc/**/*.cpp"), depends=relative("csrc/**/*.h"))
    ],
    cmdclass={"build_ext": BuildCore},
)
