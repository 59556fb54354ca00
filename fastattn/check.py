"""`python -m fastattn check`: every op on this machine, on every tier and backend, against the error rule."""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastattn import dispatch, layer_norm, rms_norm, rotary
from fastattn.bench import console
from fastattn.cpu._core import core, missing
from fastattn.testing.check import (
    OPTION_SETS,
    PACKED_OPTION_SETS,
    check_attention,
    check_varlen,
    option_set,
    packed_option_set,
)
from fastattn.testing.check_decode import DECODE_OPTION_SETS, check_decode, decode_inputs, decode_option_set
from fastattn.testing.check_linear import OPS as LINEAR_OPS
from fastattn.testing.check_linear import OPTION_SETS as LINEAR_OPTION_SETS
from fastattn.testing.check_linear import check_linear, inputs, with_options
from fastattn.testing.check_op import (
    NORM_OPTION_SETS,
    ROTARY_OPTION_SETS,
    check_op,
    norm_inputs,
    rotary_inputs,
)
from fastattn.testing.inputs import packed_qkv, qkv

Probe = Callable[..., None]  # takes `backend`; raises NotImplementedError where that refuses

_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# B, H, Hk, Sq, Sk, D, Dv
_SHAPES = {
    "blocks": (2, 4, 2, 163, 290, 64, 64),
    "odd": (1, 3, 1, 61, 77, 33, 129),
    "one query": (2, 6, 2, 1, 2100, 64, 64),
    "few queries": (1, 4, 4, 7, 1029, 128, 80),
    "widest": (1, 1, 1, 40, 50, 512, 511),
    "long": (1, 8, 2, 700, 1500, 128, 128),
    "no keys": (1, 2, 2, 3, 0, 8, 8),
}
# Lengths of queries and of keys, then H, Hk, D, Dv.
_PACKED = {
    "ragged": ((5, 37, 1, 64), (53, 37, 130, 3), 3, 3, 17, 29),
    "gqa": ((65, 14, 15), (130, 300, 33), 6, 2, 64, 64),
    "empty": ((0, 20, 11, 7), (10, 20, 0, 40), 4, 2, 32, 32),
    "decoding": ((1, 1, 1, 4), (700, 1, 1300, 65), 4, 2, 64, 64),
}
# Keys in the cache, H, Hk, Sq, D; then how the cache is kept.
_CACHES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "dense": (([700, 1, 1300], 6, 2, 1, 64), {}),
    "append": (([300, 0, 17], 6, 2, 3, 64), {"new": 3, "rotary_dim": 32}),
    "pages": (([130, 1, 64], 8, 2, 1, 128), {"page_size": 16, "new": 1}),
    "int8": (([300, 5, 77], 4, 2, 2, 64), {"cache_dtype": torch.int8, "new": 2}),
    "int8 pages": (([300, 5], 4, 2, 1, 64), {"cache_dtype": torch.int8, "page_size": 16}),
    "chosen rows": (([90, 33], 3, 3, 1, 80), {"select": True}),
}
# Rows, features, (hidden features,) features of the output or classes.
_PRODUCTS = {
    "one": (1, 1, 1, 1),
    "one row": (1, 260, 517, 129),
    "few rows": (7, 96, 700, 100),
    "blocks": (130, 64, 256, 64),
    "odd": (37, 53, 29, 31),
    "wide": (20, 30, 1500, 33),
    "no rows": (0, 7, 6, 5),
}


def _attention(dtype: torch.dtype) -> Iterator[tuple[str, Probe]]:
    def run(shape: tuple[int, ...], option: str, backend: str, gradients: bool = True) -> None:
        q, k, v = qkv(*shape, dtype=dtype)
        check_attention(q, k, v, backend=backend, gradients=gradients, **option_set(option, q, k))

    for name, shape in _SHAPES.items():
        yield name, partial(run, shape, "plain")
        yield f"{name}, causal", partial(run, shape, "causal")
    for size in range(1, 50):  # every length and head dim of a tile
        yield f"size {size}", partial(run, (1, 1, 1, size, 50 - size, size, 70 - size), "plain")
    for option in OPTION_SETS:
        yield f"options: {option}", partial(run, (2, 4, 2, 77, 150, 40, 24), option)
        yield f"decoding: {option}", partial(run, (1, 4, 2, 3, 1100, 40, 24), option, gradients=False)


def _varlen(dtype: torch.dtype) -> Iterator[tuple[str, Probe]]:
    def run(shape: tuple[Any, ...], option: str, backend: str) -> None:
        tensors = packed_qkv(*shape, dtype=dtype)
        given = packed_option_set(option, tensors[0], batch=len(shape[0]))
        check_varlen(*tensors, backend=backend, **given)

    for name, shape in _PACKED.items():
        yield name, partial(run, shape, "plain")
        yield f"{name}, causal", partial(run, shape, "causal")
    for option in PACKED_OPTION_SETS:
        yield f"options: {option}", partial(run, ((90, 0, 5, 33), (150, 12, 2, 33), 6, 3, 40, 24), option)


def _decode(dtype: torch.dtype) -> Iterator[tuple[str, Probe]]:
    def run(shape: tuple[Any, ...], kept: dict[str, Any], option: str, backend: str) -> None:
        inputs = decode_inputs(*shape, dtype=dtype, **kept)
        check_decode(backend=backend, **inputs, **decode_option_set(option, inputs["q"]))

    for name, (shape, kept) in _CACHES.items():
        yield name, partial(run, shape, kept, "plain")
    for option in DECODE_OPTION_SETS:
        yield f"options: {option}", partial(run, ([150, 12, 33], 6, 3, 2, 40), {}, option)


def _linear(op: str, dtype: torch.dtype) -> Iterator[tuple[str, Probe]]:
    has_hidden = "feed_forward" in op

    def run(sizes: tuple[int, ...], option: str, backend: str) -> None:
        given = inputs(op, sizes if has_hidden else sizes[:3], dtype=dtype)
        check_linear(op, with_options(op, option, given), backend=backend)

    options = LINEAR_OPTION_SETS[op]
    for name, sizes in _PRODUCTS.items():
        yield name, partial(run, sizes, "none" if "none" in options else "plain")
        if sizes[0]:
            yield f"{name}, transposed", partial(run, sizes, "transposed")
    for size in range(1, 50):  # every remainder of a tile
        yield f"size {size}", partial(run, (size, 51 - size, size, 1 + size * 7 % 50), options[0])
    for option in options:
        yield f"options: {option}", partial(run, (70, 48, 90, 56), option)
        yield f"one row: {option}", partial(run, (1, 48, 90, 56), option)


def _norm(op: Callable[..., Any], dtype: torch.dtype) -> Iterator[tuple[str, Probe]]:
    def run(shape: tuple[int, ...], option: str, backend: str) -> None:
        check_op(op, norm_inputs(op, option, *shape, dtype=dtype), backend=backend)

    for columns in range(1, 80):  # every length of four vectors, and what is left
        yield f"row of {columns}", partial(run, (3, columns), "everything")
    for name, shape in {"many rows": (1031, 65), "long rows": (35, 4100), "no rows": (0, 8)}.items():
        yield name, partial(run, shape, "everything")
    for of, option in NORM_OPTION_SETS:
        if of is op:
            yield f"options: {option}", partial(run, (70, 100), option)


def _rotary(dtype: torch.dtype) -> Iterator[tuple[str, Probe]]:
    def run(head_dim: int, option: str, interleaved: bool, backend: str) -> None:
        inputs = rotary_inputs(
            option, 2, 9, 3, head_dim, rotary_dim=head_dim // 4 * 2 or 2, dtype=dtype, interleaved=interleaved
        )
        check_op(rotary, inputs, backend=backend)

    for head_dim in range(2, 80):
        yield f"head of {head_dim}", partial(run, head_dim, "tables", bool(head_dim % 2))
    for option in ROTARY_OPTION_SETS:
        yield f"options: {option}", partial(run, 64, option, False)
        yield f"options: {option}, interleaved", partial(run, 64, option, True)


# By op: its probes for one type. Every file of fastattn/ops has a line.
PROBES: dict[str, Callable[[torch.dtype], Iterator[tuple[str, Probe]]]] = {
    "attention": _attention,
    "attention_varlen": _varlen,
    "attention_decode": _decode,
    **{op: partial(_linear, op) for op in LINEAR_OPS},
    "layer_norm": partial(_norm, layer_norm),
    "rms_norm": partial(_norm, rms_norm),
    "rotary": _rotary,
}


def probes(op: str, only: str = "") -> dict[str, Probe]:
    """By name, those of an op whose name has the text."""
    return {
        name: probe
        for type_name, dtype in _TYPES.items()
        for label, probe in PROBES[op](dtype)
        if only in (name := f"{type_name} {label}")
    }


@dataclass
class Outcome:
    """What the probes of one op have shown on one backend and tier."""

    op: str
    backend: str
    tier: str
    passed: int = 0
    refused: dict[str, str] = field(default_factory=dict)  # by probe: the reason
    failed: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


class Worker:
    """A process of its own for one tier, so that a kernel that crashes is a result like any other."""

    def __init__(self, tier: str) -> None:
        self._tier = tier
        self._pool: ProcessPoolExecutor | None = None

    def run(self, call: Callable[..., tuple[str, str]], *args: Any) -> tuple[str, str]:
        """What the call returns there; where the process dies, the next call gets a new one."""
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, spawn, initializer=_use, initargs=(self._tier,))
        try:
            return self._pool.submit(call, *args).result()
        except BrokenProcessPool:
            self.close()
            return "failed", "the process died"

    def close(self) -> None:
        """Ends the process."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _use(tier: str) -> None:
    core.set_isa(tier)


def run_probe(op: str, name: str, backend: str) -> tuple[str, str]:
    """Runs one probe here; returns passed, refused or failed, and why."""
    try:
        probes(op, name)[name](backend=backend)
    except NotImplementedError as error:
        return "refused", str(error)
    except Exception as error:  # whatever it is, the op is not proven
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


def running() -> Iterator[str]:
    """The backends that run on this machine's CPU at all."""
    for verdict in dispatch.explain(rms_norm, torch.zeros(1, 8)):
        if verdict.reason is None:
            yield verdict.backend


def prove(ops: Sequence[str], tiers: Sequence[str], only: str = "") -> list[Outcome]:
    """Runs all probes, with a progress bar on stderr."""
    names = {op: list(probes(op, only)) for op in ops}
    outcomes = []
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=Console(stderr=True), transient=True,
    ) as progress:  # fmt: skip
        backends = list(running())
        task = progress.add_task("", total=len(tiers) * len(backends) * sum(map(len, names.values())))
        for tier in tiers:
            worker = Worker(tier)
            for backend in backends:
                for op in ops:
                    outcome = Outcome(op, backend, tier)
                    start = time.perf_counter()
                    for name in names[op]:
                        progress.update(task, description=f"{op}, {tier}, {name}")
                        _record(outcome, name, *worker.run(run_probe, op, name, backend))
                        progress.advance(task)
                    outcome.seconds = time.perf_counter() - start
                    outcomes.append(outcome)
            worker.close()
    return outcomes


def _record(outcome: Outcome, name: str, state: str, why: str) -> None:
    if state == "passed":
        outcome.passed += 1
    else:
        (outcome.refused if state == "refused" else outcome.failed)[name] = why


def show(outcomes: Sequence[Outcome], out: Console) -> None:
    """A table, the reasons, and the verdict."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("op", "backend", "tier"):
        table.add_column(name, no_wrap=True)
    for name in ("passed", "refused", "failed", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for o in outcomes:
        failed = f"[red]{len(o.failed)}[/]" if o.failed else "0"
        refused = f"[yellow]{len(o.refused)}[/]" if o.refused else "0"
        table.add_row(o.op, o.backend, o.tier, str(o.passed), refused, failed, f"{o.seconds:.1f} s")
    out.print(table)
    for o in outcomes:
        for name, why in o.failed.items():
            text = f"failed: {o.op}, {o.backend}, {o.tier}, {name}: {why}"
            out.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
    for why in dict.fromkeys(why for o in outcomes for why in o.refused.values()):
        out.print(f"refused: {why}", highlight=False, markup=False, soft_wrap=True)
    out.print(verdict(outcomes), highlight=False)


def verdict(outcomes: Sequence[Outcome]) -> str:
    """One line; plain text."""
    passed = sum(o.passed for o in outcomes)
    failed, refused = (sum(len(getattr(o, name)) for o in outcomes) for name in ("failed", "refused"))
    total = passed + failed + refused
    parts = [f"{total} calls in {sum(o.seconds for o in outcomes):.0f} s"]
    if refused:
        parts.append(f"{refused} refused")
    parts.append(f"{failed} failed" if failed else f"{passed} within the error rule, none outside")
    return "; ".join(parts)


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the verb to the command line."""
    parser = verbs.add_parser(
        "check",
        help="every op on every tier and backend of this machine, against the error rule",
        description="Runs every op, forward and backward, on every tier of the kernels that this machine\n"
        "can run, with small and awkward shapes, all types and all options, and holds the results\n"
        "against a float64 reference. Takes under two minutes; needs no test framework. The exit code is 1\n"
        "where anything fails.",
        epilog="examples:\n"
        "  python -m fastattn check\n"
        "  python -m fastattn check --tier avx2 --op attention\n"
        "  python -m fastattn check --only 'bf16 options: softcap'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tiers = [] if core is None else core.isa_tiers()
    parser.add_argument("--op", choices=list(PROBES), help="default: all")
    parser.add_argument("--tier", choices=tiers, help="default: all that this machine can run")
    parser.add_argument("--only", metavar="TEXT", default="", help="only calls whose name has it")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """The verb."""
    if core is None:
        args.parser.exit(1, f"nothing to check: {missing}\n")
    ops = [args.op] if args.op else list(PROBES)
    tiers = [args.tier] if args.tier else list(core.isa_tiers())
    if not any(probes(op, args.only) for op in ops):
        args.parser.error(f"--only: no call has {args.only!r} in its name")
    outcomes = prove(ops, tiers, args.only)
    show(outcomes, console())
    return 1 if any(o.failed for o in outcomes) else 0
