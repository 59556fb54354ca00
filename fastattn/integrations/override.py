"""sdpa_override: fastattn in the place of torch's scaled_dot_product_attention, for a while."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn import dispatch
from fastattn.integrations.sdpa import bshd, scaled_dot_product_attention, unit_stride
from fastattn.ops.attention import attention, check

# What a call of fastattn raises where it does not take the arguments.
_REFUSALS = (NotImplementedError, TypeError, ValueError)


class SdpaOverride:
    """An override of torch's SDPA, made by `sdpa_override`. May be entered again, also inside itself.

    Attributes:
        via: "registry" or "function".
        calls: how many calls fastattn served while this was the innermost override.
        refused: reason -> how many calls went to torch's own implementation for it.
    """

    def __init__(self, via: Literal["registry", "function"]) -> None:
        self.via = via
        self.calls = 0
        self.refused: Counter[str] = Counter()

    def __enter__(self) -> "SdpaOverride":
        _enter(self)
        return self

    def __exit__(self, *_: object) -> None:
        _leave(self)

    def __repr__(self) -> str:
        refused = "".join(f"\n  {n} to torch: {reason}" for reason, n in self.refused.items())
        return f"sdpa_override(via={self.via!r}): {self.calls} calls by fastattn{refused}"

    def takes_calls(self) -> bool:
        """Whether fastattn is to be tried at all; asked at every call."""
        return True

    def count(self, refusal: Exception | None) -> None:
        """Told of every call: None, or why fastattn did not take it."""
        if refusal is None:
            self.calls += 1
        else:
            self.refused[str(refusal)] += 1


def sdpa_override(*, via: Literal["registry", "function"] | None = None) -> SdpaOverride:
    """`with sdpa_override() as handle:` whatever calls torch's SDPA inside runs on fastattn.

    A call that fastattn does not take (float64, a device without a backend) goes to the
    implementation that torch would have used; `handle.calls` and `handle.refused` say how many went
    where, and why. On exit, also by an exception, everything is as it was. Overrides nest; the
    innermost one counts. An override holds for the whole process, not for one thread.

    torch.nn's inference fast path, which computes attention without SDPA, is off meanwhile.

    Args:
        via: "registry": torch.nn.attention's registry of flash implementations (torch >= 2.11). It
            also reaches callers in C++ and `from ... import scaled_dot_product_attention`. On the
            CPU, torch asks it for calls of rank 4 without dropout, with Dv = D, and with no mask
            that needs a gradient.
            "function": `torch.nn.functional.scaled_dot_product_attention` is replaced. It takes any
            arguments, from all who look it up there when they call it.
            Default: the registry where there is one.
    Raises:
        ValueError: via is unknown. RuntimeError: this torch has no registry.
    """
    has_registry = hasattr(torch.nn.attention, "register_flash_attention_impl")
    has_registry = has_registry and hasattr(torch.library, "get_kernel")
    if via is None:
        via = "registry" if has_registry else "function"
    if via not in _INSTALL:
        raise ValueError(f"via must be 'registry' or 'function', got {via!r}")
    if via == "registry" and not has_registry:
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of attention, 2.11 has; use via='function'"
        )
    return SdpaOverride(via)


# All overrides entered and not yet left, the innermost last; and how to undo what they installed.
_active: list[SdpaOverride] = []
_undo: dict[str, Callable[[], None]] = {}
_lock = threading.RLock()


def _enter(override: SdpaOverride) -> None:
    with _lock:
        if override.via not in _undo:
            _undo[override.via] = _INSTALL[override.via]()
        if not _active:
            _undo["fast path"] = _install_slow_path()
        _active.append(override)


def _leave(override: SdpaOverride) -> None:
    with _lock:
        _active.reverse()  # the entry to take out is the latest one
        _active.remove(override)
        _active.reverse()
        if not _active:
            _undo.pop("fast path")()
        if all(other.via != override.via for other in _active):
            _undo.pop(override.via)()


def _innermost(via: str) -> SdpaOverride | None:
    return next((x for x in reversed(_active) if x.via == via), None)


def _install_slow_path() -> Callable[[], None]:
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(enabled)


# ---- via the function ----

_torch_sdpa = F.scaled_dot_product_attention  # what _replacement falls back to


def _install_function() -> Callable[[], None]:
    global _torch_sdpa
    original = _torch_sdpa = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = _replacement

    def undo() -> None:
        # Whoever replaced it after us holds ours as the original: theirs stays, ours passes on.
        if F.scaled_dot_product_attention is _replacement:
            F.scaled_dot_product_attention = original

    return undo


def _replacement(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if torch.compiler.is_compiling():
        # A graph keeps what is decided here, and can neither try nor count.
        if query.device.type in dispatch.ORDER and query.dtype is not torch.float64:
            return scaled_dot_product_attention(*arguments, **options)
        return _torch_sdpa(*arguments, **options)
    override = _innermost("function")
    if override is None or not override.takes_calls():
        return _torch_sdpa(*arguments, **options)
    try:
        if query.is_nested or torch.overrides.has_torch_function((query, key, value)):
            raise NotImplementedError(f"query is no plain tensor but a {type(query).__name__}")
        out = scaled_dot_product_attention(*arguments, **options)
    except _REFUSALS as refusal:
        override.count(refusal)
    else:
        override.count(None)
        return out
    return _torch_sdpa(*arguments, **options)


# ---- via torch's registry ----

_IMPL = "FASTATTN"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"


def _install_registry() -> Callable[[], None]:
    registry = torch.nn.attention
    previous = registry.current_flash_attention_impl()
    registry.register_flash_attention_impl(_IMPL, register_fn=_CpuKernels)
    registry.activate_flash_attention_impl(_IMPL)

    def undo() -> None:
        # Another implementation activated since then has taken ours out already, and stays.
        if registry.current_flash_attention_impl() == _IMPL:
            registry.restore_flash_attention_impl()
            if previous is not None:
                registry.activate_flash_attention_impl(previous)

    return undo


class _CpuKernels:
    """Our kernels under torch's operators, for as long as the library lives. The registry keeps this."""

    def __init__(self) -> None:
        self.forward = torch.library.get_kernel(f"aten::{_FORWARD}", "CPU")
        self.backward = torch.library.get_kernel(f"aten::{_BACKWARD}", "CPU")
        self.library: torch.library.Library | None = torch.library.Library("aten", "IMPL", "CPU")
        with warnings.catch_warnings():
            # That a kernel is being overridden is what we were asked for.
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered")
            self.library.impl(_FORWARD, self._forward, with_keyset=True)
            self.library.impl(_BACKWARD, self._backward, with_keyset=True)

    def remove(self) -> None:
        self.library = None  # the last reference: torch's own kernels are back

    def _forward(
        self,
        keyset: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[B, H, S, D]; a bool mask arrives as 0 and -inf. Returns out and lse [B, H, Sq]."""
        override = _innermost("registry")  # none where somebody activated "FASTATTN" by hand
        if override is None or override.takes_calls():
            try:
                if dropout_p > 0.0:
                    raise NotImplementedError("torch's operator has no place for a dropout's seed")
                q, k, v, window = bshd(query, key, value, is_causal)
                with torch.no_grad():
                    out, lse = attention(
                        q,
                        k,
                        v,
                        window_size=window,
                        softmax_scale=scale,
                        bias=attn_mask,
                        return_lse=True,
                    )
            except _REFUSALS as refusal:
                if override is not None:
                    override.count(refusal)
            else:
                if override is not None:
                    override.count(None)
                return _as_torch(query, out, lse)
        arguments = (query, key, value, dropout_p, is_causal)
        theirs = self.forward.call_boxed(keyset, *arguments, attn_mask=attn_mask, scale=scale)
        return cast(tuple[Tensor, Tensor], theirs)

    def _backward(
        self,
        keyset: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """From the out and lse that were saved, whichever kernel made them. Counted is the forward."""
        try:
            q, k, v, window = bshd(query, key, value, is_causal)
            call = check(q, k, v, window_size=window, softmax_scale=scale, bias=attn_mask)
            dq, dk, dv, *_ = torch.ops.fastattn.attention_bwd.default(
                unit_stride(grad_out.transpose(1, 2)),
                torch.zeros_like(logsumexp, memory_format=torch.contiguous_format),
                out.transpose(1, 2),
                logsumexp.contiguous(),
                torch.zeros_like(logsumexp, memory_format=torch.contiguous_format),
                *call,
                False,
                dispatch.DEFAULT,
            )
        except _REFUSALS:
            arguments = (grad_out, query, key, value, out, logsumexp, dropout_p, is_causal)
            theirs = self.backward.call_boxed(keyset, *arguments, attn_mask=attn_mask, scale=scale)
            return cast(tuple[Tensor, Tensor, Tensor], theirs)
        if unseen := key.shape[2] - dk.shape[1]:
            dk, dv = (F.pad(x, (0, 0, 0, 0, 0, unseen)) for x in (dk, dv))
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _as_torch(query: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with the strides that torch's operator promises to compiled graphs.

    Rows that see nothing get 0 as their lse, as torch's own backward wants it, which may run later.
    """
    out, promised = out.transpose(1, 2), torch.empty_like(query)
    if out.stride() != promised.stride():
        out = promised.copy_(out)
    lse = lse.masked_fill(lse == -torch.inf, 0.0)
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


_INSTALL: dict[str, Callable[[], Callable[[], None]]] = {
    "function": _install_function,
    "registry": _install_registry,
}
