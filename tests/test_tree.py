"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import fastattn

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastattn", "csrc", "tests", "benchmarks", "docs", "examples")
BACKENDS = ("cpu", "cuda", "triton")
OPS = sorted(p.stem for p in ROOT.glob("fastattn/ops/*.py") if not p.stem.startswith("_"))

# Who imports whom at run time: a file or folder of fastattn/, and those it may name besides itself.
# dispatch reaches the backends by importlib alone, so no arrow leads from it to them.
ABOVE_DISPATCH = {"dispatch"}
ABOVE_OPS = ABOVE_DISPATCH | {"dropout", "ops"}
ABOVE_NN = ABOVE_OPS | {"merge", "nn", "weights"}
MAY_IMPORT = {
    "_C": set(),
    "cpu": {"_C", "dropout"},
    "cuda": {"_C", "dropout"},
    "triton": {"dropout"},
    "dispatch": set(),
    "dropout": set(),
    "ops": ABOVE_DISPATCH | {"dropout"},
    "merge": ABOVE_OPS,
    "weights": ABOVE_OPS,
    "distributed": ABOVE_OPS | {"merge"},
    "nn": ABOVE_OPS,
    "models": ABOVE_NN | {"distributed"},
    "integrations": ABOVE_NN,
    "testing": ABOVE_NN | {"__init__"},
    "__init__": ABOVE_NN | {"models", "integrations"},
}
# The commands of `python -m fastattn`; nothing imports them, and they import what they like.
PROGRAMS = ("__main__", "bench", "check", "compare", "demo", "generate", "info", "train")

MAX_LINES = {".py": 400, ".inl.h": 600, ".cuh": 600, ".cpp": 250, ".h": 250, ".cu": 250}
# Files over the limit: how many lines they may have, and why.
LONGER: dict[str, tuple[int, str]] = {}

MACROS = {
    "FASTATTN_CUDA_CHECK": "names the file and line of a failing CUDA call",
    "FASTATTN_TEXT": "the tier's name as text; only the preprocessor can do that",
    "FASTATTN_TEXT_OF": "expands FASTATTN_TEXT's argument first",
}
VARIABLES = {"FASTATTN_BACKEND", "FASTATTN_CPU_ISA"}
SECTIONS = ("Shapes", "Types", "Args", "Errors", "Raises", "Backends", "Source")


def files(*endings: str, under: tuple[str, ...] = FOLDERS) -> Iterator[Path]:
    for folder in under:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.name.endswith(endings) and "__pycache__" not in path.parts:
                yield path


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports when it runs, whether at the top or inside a function."""
    tree = ast.parse(path.read_text())
    for_types = {
        node
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for child in guard.body
        for node in ast.walk(child)
    }
    package = name_of(path).removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(path: Path) -> str:
    """The file or folder of fastattn/ that a path belongs to."""
    return path.relative_to(ROOT / "fastattn").parts[0].removesuffix(".py")


def room_named(full_name: str) -> str:
    name = [*full_name.split("."), "__init__"][1]
    is_room = name == "_C" or any((ROOT / "fastattn" / x).exists() for x in (name, f"{name}.py"))
    return name if is_room else "__init__"


def test_imports_follow_the_arrow() -> None:
    offences = []
    for path in files(".py", under=("fastattn",)):
        here = room(path)
        if here in PROGRAMS:
            continue
        assert here in MAY_IMPORT, f"{name_of(path)} has no place in the arrow: give it one here"
        for full_name in imports(path):
            if full_name.split(".")[0] != "fastattn":
                continue
            if room_named(full_name) not in MAY_IMPORT[here] | {here}:
                offences.append(f"{name_of(path)} imports {full_name}")
    assert not offences


def test_only_one_folder_imports_triton() -> None:
    offences = [
        name_of(path)
        for path in files(".py", under=("fastattn",))
        if room(path) != "triton" and any(x.split(".")[0] == "triton" for x in imports(path))
    ]
    assert not offences


def test_backends_hold_ops_alone() -> None:
    found = [p for backend in BACKENDS for p in ROOT.glob(f"fastattn/{backend}/*.py")]
    assert not [name_of(p) for p in found if p.stem[0] != "_" and p.stem not in OPS]


@pytest.mark.parametrize("op", OPS)
def test_op_is_whole(op: str) -> None:
    wanted = (
        f"tests/test_{op}.py",
        f"fastattn/testing/cases/{op}.py",
        f"benchmarks/{op}.py",
        f"docs/{op}.md",
    )
    missing = [path for path in wanted if not (ROOT / path).is_file()]
    assert not missing
    assert f"`{op}`" in (ROOT / "README.md").read_text(), "README.md does not list the op"


@pytest.mark.parametrize("op", OPS)
def test_docstring_is_whole(op: str) -> None:
    function = getattr(importlib.import_module(f"fastattn.ops.{op}"), op)
    text = inspect.getdoc(function) or ""
    wanted = [rf"^{section}:" for section in SECTIONS]
    wanted += [rf"\b{name}\b" for name in inspect.signature(function).parameters]
    assert not [x for x in wanted if not re.search(x, text, re.MULTILINE)]


def test_all_is_what_is_exported() -> None:
    public = {x for x in vars(fastattn) if not x.startswith("_")}
    modules = {x for x in public if isinstance(getattr(fastattn, x), ModuleType)}
    assert public - modules == set(fastattn.__all__) - modules


def test_files_are_short() -> None:
    offences = []
    for path in [*files(*MAX_LINES), ROOT / "setup.py"]:
        limit = next(n for ending, n in MAX_LINES.items() if path.name.endswith(ending))
        allowed, _ = LONGER.get(name_of(path), (limit, ""))
        lines = len(path.read_text().splitlines())
        if lines > allowed:
            offences.append(f"{name_of(path)}: {lines} lines, at most {allowed}")
        elif allowed > limit >= lines:
            offences.append(f"{name_of(path)}: needs no exception any more")
    assert not offences


def offending_lines(pattern: str, paths: Iterator[Path]) -> list[str]:
    return [
        f"{name_of(path)}: {line.strip()}"
        for path in paths
        for line in without_comments(path.read_text()).splitlines()
        if re.search(pattern, line)
    ]


def cpp_files() -> Iterator[Path]:
    return files(".h", ".cpp", ".cu", ".cuh", under=("csrc",))


def test_core_includes_no_torch() -> None:
    assert not offending_lines(r"#\s*include\s*[<\"](torch|ATen|c10|caffe2)\b", cpp_files())


def test_intrinsics_stay_in_vec() -> None:
    elsewhere = (p for p in cpp_files() if not name_of(p).startswith("csrc/cpu/vec"))
    assert not offending_lines(r"\w*(immintrin|x86intrin|arm_neon)|\b_mm\d*_|\b__m\d+", elsewhere)


def test_headers_open_no_namespace() -> None:
    headers = (p for p in cpp_files() if p.suffix in (".h", ".cuh"))
    assert not offending_lines(r"\busing\s+namespace\b", headers)


def test_macros_are_few() -> None:
    known = "|".join(MACROS)
    assert not offending_lines(rf"#\s*define\s+(?!(?:{known})\()\w+\(", cpp_files())


def test_kernels_stay_in_their_namespace() -> None:
    """Outside of it, the linker might keep one tier's copy of a function for all tiers."""
    offences = []
    for path in files(".inl.h", under=("csrc/cpu",)):
        code = re.sub(r"^\s*#(?:[^\n]*\\\n)*[^\n]*", "", path.read_text(), flags=re.MULTILINE)
        depth, outside = 0, ""
        for piece in re.split(r"([{}])", without_comments(code)):
            depth += {"{": 1, "}": -1}.get(piece, 0)
            if depth == 0 and piece != "}":
                outside += piece
        if set(outside.split()) - {"namespace", "fastattn::FASTATTN_ISA"}:
            offences.append(f"{name_of(path)}: {outside.split()}")
    assert not offences


def test_objects_share_no_symbols() -> None:
    """The same rule, seen in what the compiler made of it."""
    if (nm := shutil.which("nm")) is None:
        pytest.skip("there is no nm")
    tiers = [p.stem for p in ROOT.glob("csrc/cpu/isa_*.cpp")]
    objects = [
        p
        for p in ROOT.glob(f"build/core-*-{sys.implementation.cache_tag}/csrc/cpu/isa_*.o")
        if p.stem in tiers
    ]
    if not objects:
        pytest.skip("the core was not built in this tree")
    offences = []
    for path in objects:
        inside = f"fastattn::{path.stem.removeprefix('isa_')}::"
        command = [nm, "--demangle", "--defined-only", str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for line in listing.splitlines():
            _, kind, symbol = line.split(maxsplit=2)
            if kind in "VWu" and inside not in symbol:
                offences.append(f"{path.name}: {symbol}")
    assert not offences


def test_nothing_is_left_for_later() -> None:
    mark = re.compile(r"\b(TOD[O]|FIXM[E]|XX[X])\b")
    texts = files(*MAX_LINES, ".md", ".txt", ".toml")
    assert not [name_of(path) for path in texts if mark.search(path.read_text())]


def test_names_say_something() -> None:
    empty = {"utils", "util", "common", "helpers", "misc"}
    assert not [name_of(p) for p in files(*MAX_LINES) if p.name.split(".")[0].strip("_") in empty]


def test_environment_variables_are_two() -> None:
    found = set()
    for path in files(".py", under=("fastattn",)):
        found |= set(re.findall(r"\bFASTATTN_\w+", path.read_text()))
    for path in cpp_files():  # macros have such names too, but not in quotes
        for text in re.findall(r'"[^"\n]*"', path.read_text()):
            found |= set(re.findall(r"\bFASTATTN_\w+", text))
    assert found <= VARIABLES


def test_documents_name_what_exists() -> None:
    names = {p.name for p in files("")} | {p.name for p in ROOT.iterdir()}
    source = re.compile(r"\w[\w.-]*\.(py|md|h|cpp|cu|cuh)")
    offences = []
    for path in [*ROOT.glob("*.md"), *files(".md", under=("docs",))]:
        prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        for token in re.findall(r"`([^`\s]+)`", prose):
            name = token.split("::")[0].rstrip("/")
            if "<" in name or "{" in name:
                continue
            if name.split("/")[0] in (*FOLDERS, ".ci") and "/" in name:
                exists = any(ROOT.glob(name))
            else:
                exists = name in names or not source.fullmatch(name)
            if not exists:
                offences.append(f"{name_of(path)}: {token}")
    assert not offences
