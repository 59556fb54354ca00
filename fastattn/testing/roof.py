"""The roof of this machine, measured: speeds are quoted as a share of it."""

import time
from dataclasses import dataclass
from types import ModuleType

import torch

# Far beyond any cache, small enough for a laptop.
_MEGABYTES = 512


@dataclass(frozen=True)
class Roof:
    """The most that `threads` threads get out of this machine."""

    fp32_gflops: float  # fused multiply-adds, 2 FLOP each
    bf16_gflops: float  # by bf16 instructions where there are any, else as fp32
    read_gbs: float  # 1e9 bytes read per second, far from the caches
    copy_gbs: float  # bytes read + bytes written
    threads: int

    def gflops(self, dtype: str) -> float:
        """The peak for inputs of this type; fp16 is computed in fp32."""
        return self.bf16_gflops if dtype == "bf16" else self.fp32_gflops

    def at_least(self, other: "Roof") -> "Roof":
        """The higher of two measurements: a roof can only be measured too low."""
        return Roof(
            max(self.fp32_gflops, other.fp32_gflops),
            max(self.bf16_gflops, other.bf16_gflops),
            max(self.read_gbs, other.read_gbs),
            max(self.copy_gbs, other.copy_gbs),
            self.threads,
        )


def measure(core: ModuleType, seconds: float = 0.3) -> Roof:
    """Measures each of the four for that long, with torch's number of threads.

    Args:
        core: fastattn._C, which holds the loops that reach the roof.
    """
    threads = torch.get_num_threads()
    fp32 = core.fma_peak(bf16=False, threads=threads, seconds=seconds)
    bf16 = core.fma_peak(bf16=True, threads=threads, seconds=seconds)
    read = core.read_bandwidth(megabytes=_MEGABYTES, threads=threads, seconds=seconds)
    return Roof(fp32, max(fp32, bf16), read, _copy_bandwidth(seconds), threads)


def _copy_bandwidth(seconds: float) -> float:
    """GB/s of torch's own copy, the best of the runs that fit."""
    source = torch.ones(_MEGABYTES // 2, 1 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    best = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.numel() / best / 1e9
