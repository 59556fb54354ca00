"""Triton itself, what to say where it is missing, and how a kernel is launched."""

from functools import cache
from typing import Any, TypeVar

import torch


class _Absent:
    """Stands for Triton where there is none, as far as a file of kernels uses it on its import."""

    def __getattr__(self, name: str) -> "_Absent":
        return self

    def __call__(self, wrapped: Any = None, **_: Any) -> Any:
        return self if wrapped is None else wrapped


missing: str | None = None
interpreting = False  # kernels run in Triton's interpreter, with numpy
try:
    import triton
    import triton.language as tl

    interpreting = bool(triton.knobs.runtime.interpret)
except (ImportError, AttributeError) as error:
    missing = f"Triton is missing or too old ({error}); pip install triton==3.6.0, or newer"
    triton = tl = _Absent()

# For kernels: whether they are interpreted.
INTERPRET = tl.constexpr(interpreting)

TYPES = (torch.float32, torch.bfloat16, torch.float16)

Config = TypeVar("Config")


def unsupported(call: Any) -> str | None:
    """Why the kernels of an op that asks for nothing but a type refuse a call, or None."""
    x = call[0]
    return _refusal(x.dtype, x.device)


@cache
def _refusal(dtype: torch.dtype, device: torch.device) -> str | None:
    if missing is not None:
        return missing
    if device.type == "cpu":
        if not interpreting:
            return "runs on CUDA tensors, and on the CPU only under TRITON_INTERPRET=1"
    elif device.type != "cuda":
        return f"runs on CUDA tensors, got one on {device}"
    elif torch.version.hip is None and (has := torch.cuda.get_device_capability(device)) < (8, 0):
        return (
            "needs compute capability 8.0 (Ampere) or newer, "
            f"{torch.cuda.get_device_name(device)} has {has[0]}.{has[1]}"
        )
    return None if dtype in TYPES else f"has no kernel for {dtype}"


# Multiprocessors with 100 KB of shared memory: desktop cards of the generations 8, 12.
_SMALL = ((8, 6), (8, 7), (8, 9), (12, 0), (12, 1))


@cache
def architecture(device: torch.device) -> str:
    """The column of a kernel's table of configurations: sm80, sm89, sm90 or, interpreted, cpu."""
    if interpreting:
        return "cpu"
    if torch.version.hip is not None:
        return "sm80"
    has = torch.cuda.get_device_capability(device)
    if has in _SMALL:
        return "sm89"
    return "sm80" if has < (9, 0) else "sm90"


def config(table: dict[str, Config], device: torch.device) -> Config:
    """What a table of configurations says of a device."""
    return table[architecture(device)]


def launch(kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *args: Any, **options: Any) -> None:
    """Runs a kernel, whose first argument is x, on x's device: Triton itself takes the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](x, *args, **options)
    else:
        kernel[grid](x, *args, **options)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length() if n > 1 else 1
