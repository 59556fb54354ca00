"""README.md and README.zh-CN.md hold what they promise: names, commands and files are looked up."""

import argparse
import ast
import inspect
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastattn.__main__ import make_parser

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("README.md", "README.zh-CN.md")
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = ("fastattn", "make", "pip", "python", "torchrun")


def blocks(text: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text) if found == language]


def spans(text: str) -> list[str]:
    """What stands between single backticks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", FENCE.sub("", text))]


def commands() -> list[str]:
    """Every line of the shell blocks, and the spans that are commands."""
    found = set()
    for text in TEXTS.values():
        found |= {line for block in blocks(text, "sh") for line in block.splitlines()}
        found |= {span for span in spans(text) if span.split()[0] in PROGRAMS and " " in span}
    return sorted(found)


def headings(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^(#+) (.+)$", FENCE.sub("", text), re.MULTILINE)


def anchors(text: str) -> set[str]:
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title in headings(text)}


def op_rows(text: str) -> list[str]:
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    return make_parser()


def test_both_have_the_same_code_and_the_same_parts() -> None:
    english, chinese = TEXTS.values()
    assert FENCE.findall(chinese) == FENCE.findall(english)
    assert english.count("```") == 2 * len(FENCE.findall(english)), "a fence that this test cannot read"
    assert [level for level, _ in headings(chinese)] == [level for level, _ in headings(english)]


def test_both_list_every_op() -> None:
    ops = {path.stem for path in ROOT.glob("fastattn/ops/*.py") if not path.stem.startswith("_")}
    for name, text in TEXTS.items():
        assert sorted(op_rows(text)) == sorted(ops), name


@pytest.mark.parametrize("command", commands())
def test_command_is_accepted(command: str, parser: argparse.ArgumentParser) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets
    elif words[0] == "pip":
        assert words[:2] == ["pip", "install"]
    elif words[0] == "python" and words[1] != "-m":
        assert (ROOT / words[1]).is_file()
    elif words != ["python", "-m", "fastattn"]:  # the program's name alone
        before = words.index("fastattn")
        assert words[:before] in ([], ["python", "-m"]) or (words[0], words[before - 1]) == ("torchrun", "-m")
        parser.parse_args(words[before + 1 :])


def names_in(tree: ast.AST) -> tuple[dict[str, str], list[ast.Call]]:
    """Full names of what is fastattn's, by how the code writes them; and all calls."""
    imported, written, calls = {"fastattn": "fastattn"}, {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastattn":
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            calls.append(node)
        elif isinstance(node, (ast.Attribute, ast.Name)):
            first, *rest = ast.unparse(node).split(".")
            if first in imported and all(part.isidentifier() for part in rest):
                written[ast.unparse(node)] = ".".join([imported[first], *rest])
    return {**imported, **written}, calls


@pytest.mark.parametrize("code", blocks(TEXTS["README.md"], "python"))
def test_python_is_python_and_its_names_exist(code: str) -> None:
    names, calls = names_in(ast.parse(code))
    objects: dict[str, Any] = {written: pkgutil.resolve_name(name) for written, name in names.items()}
    for call in calls:
        if (function := objects.get(ast.unparse(call.func))) is not None:
            keywords = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
            inspect.signature(function).bind(*call.args, **keywords)


@pytest.mark.parametrize("readme", NAMES)
def test_names_in_prose_exist(readme: str) -> None:
    found = {name for span in spans(TEXTS[readme]) for name in re.findall(r"\bfastattn(?:\.\w+)+", span)}
    assert len(found) > 5
    for name in found:
        pkgutil.resolve_name(name)


def files_named(text: str) -> Iterator[str]:
    for name in re.findall(r"\b(?:docs|examples|benchmarks)/[\w./*-]*", text, re.ASCII):
        yield name.rstrip(".")


@pytest.mark.parametrize("file", sorted({file for text in TEXTS.values() for file in files_named(text)}))
def test_file_exists(file: str) -> None:
    assert any(ROOT.glob(file))


@pytest.mark.parametrize("readme", NAMES)
def test_links_lead_somewhere(readme: str) -> None:
    links = [x for x in re.findall(r"\]\(([^)\s]+)\)", TEXTS[readme]) if "://" not in x]
    assert set(links) >= set(NAMES) - {readme}, "each must link to the other"
    for link in links:
        file, _, anchor = link.partition("#")
        assert (ROOT / (file or readme)).exists(), link
        assert not anchor or anchor in anchors((ROOT / (file or readme)).read_text(encoding="utf-8")), link
