"""The one rule: which backend runs a call, and why the others do not.

A backend is a folder, `fastattn/<backend>/<op>.py` holds its part of one op: `unsupported(call)`, which
returns the reason for a refusal or None, and the launchers. The tree is the registry, so "which backends
has attention?" is answered by `ls fastattn/*/attention.py`.
"""

import importlib
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch

# Per device, the order in which `auto` asks. It follows measurements in benchmarks/results/.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "triton"), "cuda": ("triton",)}

# Nothing of benchmarks/results/ shows them on a device yet: `auto` passes them over.
BY_NAME_ALONE = frozenset({"triton"})

REFERENCE = "reference"

T = TypeVar("T")

# What `backend=None` means: the first backend that supports the call, or the one named here.
DEFAULT = os.environ.get("FASTATTN_BACKEND", "auto")


class Verdict(NamedTuple):
    """What one backend says of one call: `reason` is None where it would run it."""

    backend: str
    reason: str | None

    @property
    def takes_auto(self) -> bool:
        """Whether `auto` could choose it."""
        return self.reason is None and self.backend not in BY_NAME_ALONE

    def __str__(self) -> str:
        if self.reason is None and self.backend in BY_NAME_ALONE:
            return f"has not run on a device yet; backend={self.backend!r} asks for it by name"
        return self.reason or "supports this call"


class Explanation(list[Verdict]):
    """The verdict of every backend, in the order in which `auto` asks. Prints as a small table."""

    def __repr__(self) -> str:
        chosen = next((v.backend for v in self if v.takes_auto), None)
        lines = [f"{'->' if v.backend == chosen else '  '} {v.backend:10} {v!s}" for v in self]
        lines.append(f"   {REFERENCE:10} plain PyTorch; only when named (backend={REFERENCE!r})")
        return "\n".join(lines)


@cache
def backend_module(backend: str, op: str) -> ModuleType | None:
    """`fastattn.<backend>.<op>`, or None where the tree has no such file."""
    name = f"fastattn.{backend}.{op}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and name.startswith(error.name):
            return None
        raise


def verdicts(op: str, device: torch.device, call: Any) -> Explanation:
    """Asks every backend of the device about one call."""
    found = Explanation()
    for name in ORDER.get(device.type, ()):
        module = backend_module(name, op)
        reason = f"has no {op}" if module is None else module.unsupported(call)
        found.append(Verdict(name, reason))
    return found


def choose(op: str, backend: str, device: torch.device, call: Any) -> ModuleType:
    """The module that runs this call.

    Args:
        backend: "auto", or a backend's name, which then runs or raises and is never replaced.

    Raises:
        ValueError: no backend has that name.
        NotImplementedError: none of the backends asked takes the call; gives each one's reason.
    """
    for module in _asked(op, backend, device):
        if module.unsupported(call) is None:
            return module
    raise NotImplementedError(_refusal(op, backend, device, call))


@cache
def _asked(op: str, backend: str, device: torch.device) -> tuple[ModuleType, ...]:
    """The modules that `backend` means on a device, in order."""
    order = ORDER.get(device.type, ())
    if backend != "auto":
        known = {name for names in ORDER.values() for name in names}
        if backend not in known:
            allowed = ", ".join(repr(name) for name in ("auto", *sorted(known), REFERENCE))
            raise ValueError(f"backend={backend!r} is unknown; allowed are {allowed}")
    wanted = [name for name in order if name == backend or (backend == "auto" and name not in BY_NAME_ALONE)]
    return tuple(module for name in wanted if (module := backend_module(name, op)) is not None)


def _refusal(op: str, backend: str, device: torch.device, call: Any) -> str:
    found = [v for v in verdicts(op, device, call) if backend in ("auto", v.backend)]
    if found:
        reasons = "; ".join(f"{v.backend}: {v!s}" for v in found)
    elif backend == "auto":
        reasons = f"there is no backend for device {device.type!r} (only for {sorted(ORDER)})"
    else:
        reasons = f"{backend} does not run on device {device.type!r}"
    return (
        f"fastattn.{op}: no backend takes this call. {reasons}. "
        f"backend={REFERENCE!r} runs it in plain PyTorch, slowly."
    )


def explain(op: Any, /, *args: Any, **kwargs: Any) -> Explanation:
    """Says, without running it, which backend would take a call and why the others would not.

    Args:
        op: a public op, for example `fastattn.attention`; the rest are its arguments.

    Returns:
        One `Verdict(backend, reason)` each, in order; reason None means "would run it".

    Raises:
        TypeError: `op` is not an op of fastattn. ValueError: the op itself refuses the arguments.

    Example:
        >>> print(fastattn.explain(fastattn.attention, q, k, v, causal=True))
    """
    name = getattr(op, "__name__", str(op))
    if not str(getattr(op, "__module__", "")).startswith("fastattn.ops."):
        raise TypeError(f"op must be an op such as fastattn.attention, got {op!r}")
    module = importlib.import_module(op.__module__)
    for name_of_no_input in ("backend", "return_lse", "save_memory"):
        kwargs.pop(name_of_no_input, None)
    call = module.check(*args, **kwargs)
    return verdicts(name, call[0].device, call)


def recorder(device: torch.device) -> Callable[[Callable[[], T]], tuple[Callable[[], None] | str, T]] | None:
    """`record` of the first backend of a device that has one, or None.

    `record(function)` runs a function that does nothing but launch kernels, on tensors that stay where
    they are. It returns what runs it again as one call, and the function's result, which that overwrites;
    where the function did more, it returns the reason why it cannot be run again, and the result.
    """
    for name in ORDER.get(device.type, ()):
        if (module := backend_module(name, "_program")) is not None:
            return module.record  # type: ignore[no-any-return]
    return None


def in_forward_mode() -> bool:
    """Whether tangents may be in flight, which only an autograd.Function sees (and then refuses)."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def must_trace() -> bool:
    """Whether someone records or transforms calls, so that they must pass through `torch.ops`.

    Eager calls go straight to the launcher, which saves 2 to 4 us (docs/architecture.md).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )
