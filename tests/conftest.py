"""Options and fixtures that all tests share."""

import functools
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from fastattn import attention, dispatch
from fastattn.testing.check import check_attention, refusal
from fastattn.testing.check_linear import OPS, check_linear
from fastattn.testing.effort import INTERPRETING

hypothesis.settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000)
hypothesis.settings.load_profile("fixed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        help='a backend to test, also "reference" and, under TRITON_INTERPRET=1, "triton"; may be repeated; '
        "default: cpu",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "many: makes so many calls that no interpreter should")
    if INTERPRETING:
        quicken_the_interpreter()


def quicken_the_interpreter() -> None:
    """Half of its time goes into preparing `triton.language` for each call of each function: once will do.

    Nothing is undone afterwards, so nothing can be compiled in this process.
    """
    from triton.runtime import interpreter

    prepare = interpreter._patch_lang

    @functools.cache
    def prepare_once(function: Any) -> Any:
        prepare(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepare_once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if INTERPRETING:
        for item in items:
            if item.get_closest_marker("many") or item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="too many or too large calls for an interpreter"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        names = metafunc.config.getoption("backend") or ["cpu"]
        metafunc.parametrize("backend", names, scope="session")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor starts as NaN: an element that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def check(backend: str, skip_if_refused: Callable[..., None]) -> Callable[..., None]:
    """`check_attention` on this backend; skips with the backend's own reason where it refuses."""

    def run(*qkv: torch.Tensor, gradients: bool = True, **options: Any) -> None:
        skip_if_refused(attention, *qkv, **options)
        check_attention(*qkv, backend=backend, gradients=gradients, **options)

    return run


@pytest.fixture
def check_op(backend: str, skip_if_refused: Callable[..., None]) -> Callable[..., None]:
    """The same for an op of check_linear.py, by name, and its arguments."""

    def run(op: str, given: dict[str, Any], gradients: bool = True) -> None:
        skip_if_refused(OPS[op], **given)
        check_linear(op, given, backend=backend, gradients=gradients)

    return run


@pytest.fixture
def skip_if_refused(backend: str) -> Callable[..., None]:
    """Skips with the backend's own reason where it refuses a call of an op."""

    def skip(op: Callable[..., Any], *args: Any, **options: Any) -> None:
        if reason := refusal(backend, *args, op=op, **options):
            pytest.skip(reason)

    return skip


@pytest.fixture(scope="session")
def kernel_backend(backend: str) -> str:
    """A backend that runs through the op; the reference never does."""
    if backend == dispatch.REFERENCE:
        pytest.skip("the reference is plain PyTorch and has no op")
    return backend


@pytest.fixture
def default_backend(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This backend is what `backend=None` means; or the reference, where it has not all the ops."""
    whole = all(dispatch.backend_module(backend, op) for op in ("attention_varlen", "attention_decode"))
    monkeypatch.setattr(dispatch, "DEFAULT", backend if whole else dispatch.REFERENCE)


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code in a fresh interpreter; keyword arguments are environment variables."""

    def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run
