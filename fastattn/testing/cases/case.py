"""What a benchmark case is: a call with a name, a cost, peers that can run it too, and a check."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastattn.testing import compare
from fastattn.testing.cases.peers import COMPILED, Unavailable

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESULTS = ("out", "dq", "dk", "dv")

Result = tuple[Tensor, ...]  # out, then the gradients where the case has a backward
Inputs = TypeVar("Inputs")


class Curve(NamedTuple):
    """The place of a case in a plot: one curve per peer, over x."""

    figure: str  # for example "forward, causal, D 64"
    axis: str  # what x is
    x: int


class Call(NamedTuple):
    """A peer, bound to inputs."""

    run: Callable[[], Any]  # what is timed
    result: Callable[[Any], Result]  # what it returned, in our op's layout
    names: tuple[str, ...] = RESULTS  # of what is in it


class Part(NamedTuple):
    """A piece of a case, small enough for a reference in float64."""

    reference: Callable[[torch.dtype], Result]
    of: Callable[[Result], Result]  # the same piece of a whole result
    names: tuple[str, ...] = RESULTS  # of what is in it


class Checked(NamedTuple):
    """What `Case.check` found, by peer."""

    errors: dict[str, float]  # the largest absolute one, over out and the gradients
    seconds: dict[str, float]  # that its first call took
    skipped: dict[str, str]  # why it cannot run the case


class Case(ABC, Generic[Inputs]):
    """One call to time. A file of cases derives a frozen dataclass from it and lists its shapes."""

    op: ClassVar[str]
    dtype: str  # of the inputs, as it is shown: fp32, bf16, fp16, int8
    curve: Curve | None

    @property
    @abstractmethod
    def name(self) -> str:
        """Unique, with the type, in a report; the same from version to version."""

    @property
    @abstractmethod
    def peers(self) -> tuple[str, ...]:
        """All who can be asked to run it besides ours; the usual ones first."""

    @property
    def usual_peers(self) -> tuple[str, ...]:
        """Who runs beside ours where nobody is named."""
        return self.peers[:1]

    @property
    def torch_dtype(self) -> torch.dtype:
        """In which plain PyTorch would compute it: the base of the error rule."""
        return DTYPES[self.dtype]

    @property
    @abstractmethod
    def flops(self) -> int:
        """Multiplications and additions that the result needs, whatever a kernel does besides."""

    @property
    @abstractmethod
    def bytes(self) -> int:
        """What must be read and written, each once."""

    @property
    def tokens(self) -> int:
        """Of one call, where its speed is told in tokens per second; else 0."""
        return 0

    @property
    def is_bandwidth_bound(self) -> bool:
        """Whether its work is `bytes`, and its roof a plain read of `Case.reads`."""
        return False

    @abstractmethod
    def make_inputs(self, seed: int = 0) -> Inputs:
        """One copy of the tensors."""

    @abstractmethod
    def bind(self, peer: str, x: Inputs) -> Call:
        """The call to time. Views, leaves and masks are made here, outside of it.

        Raises:
            Unavailable: the peer cannot run the case.
        """

    @abstractmethod
    def parts(self, x: Inputs) -> Iterator[Part]:
        """The pieces that are held against float64."""

    def reads(self, x: Inputs) -> Sequence[Tensor]:
        """What a plain read passes over, for a case that is bound by bandwidth."""
        return ()

    def make_copies(self) -> list[Inputs]:
        """One copy of the inputs; where bandwidth counts, as many as keep each out of the caches.

        A model reads every layer's cache between two visits to the same one, so a user's is cold.
        """
        count = 1
        if self.is_bandwidth_bound:
            count = min(max(2, math.ceil(3 * _last_level_cache() / self.bytes)), 64)
        return [self.make_inputs(seed) for seed in range(count)]

    def check(self, x: Inputs, peers: Sequence[str]) -> Checked:
        """Holds the first peer to the error rule and measures the others beside it.

        Every peer runs the whole case, exactly as it is timed. Compared with the float64 reference
        are the parts; everything else must at least be finite.

        Raises:
            AssertionError: the first peer breaks the rule.
        """
        found = Checked({}, {}, {})
        parts = [
            (part, part.reference(torch.float64), part.reference(self.torch_dtype)) for part in self.parts(x)
        ]
        for peer in peers:
            try:
                call = self.bind(peer, x)
                if peer in COMPILED:
                    call.run()
                start = time.perf_counter()
                raw = call.run()
                found.seconds[peer] = time.perf_counter() - start
                result = call.result(raw)
                _must_be_finite(call.names, result)
                found.errors[peer] = _error(result, parts, must_hold=peer == peers[0])
            except Exception as error:
                if peer == peers[0]:
                    raise
                found.skipped[peer] = reason(error)
        return found


def _must_be_finite(names: Sequence[str], result: Result) -> None:
    for name, tensor in zip(names, result, strict=False):
        if not tensor.isfinite().all():
            raise AssertionError(f"{name} has values that are not finite")


def _error(result: Result, parts: Sequence[tuple[Part, Result, Result]], must_hold: bool) -> float:
    """The largest error of a result over all parts."""
    largest = 0.0
    for part, truth, base in parts:
        for name, got, b, t in zip(part.names, part.of(result), base, truth, strict=False):
            if must_hold:
                compare.assert_close(got, b, t, name)
            largest = max(largest, compare.errors(got, b, t).ours)
    return largest


def reason(error: Exception) -> str:
    """The first line of what went wrong, with the error's type where the text does not say it all."""
    text = next(iter(str(error).strip().splitlines()), "")
    says_it_all = isinstance(error, AssertionError | NotImplementedError | Unavailable) and text
    return text if says_it_all else f"{type(error).__name__}: {text}"


def bind_read(core: ModuleType, tensors: Sequence[Tensor]) -> Callable[[], None]:
    """One pass over these tensors: the roof of a case that is bound by bandwidth."""
    threads = torch.get_num_threads()

    def read() -> None:
        for t in tensors:
            core.read_pass(t.data_ptr(), t.numel() * t.element_size(), threads)

    return read


def _last_level_cache() -> int:
    """Bytes of the largest cache that cpu 0 can see; 64 MiB where the system does not say."""
    sizes = [
        int(text.removesuffix("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text().strip()).removesuffix("K").isdecimal()
    ]
    return max(sizes, default=64 << 20)
