"""What `bench` can run, by name."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastattn.testing.cases import (
    attention,
    attention_decode,
    attention_varlen,
    feed_forward,
    gated_feed_forward,
    layer_norm,
    linear,
    linear_cross_entropy,
    model,
    own_model,
    rms_norm,
    rotary,
)
from fastattn.testing.cases.case import Case


@dataclass(frozen=True)
class Suite:
    """A list of cases and how much time each may take."""

    cases: Sequence[Case[Any]]
    budget: float  # seconds of timing a case
    min_rounds: int = 5
    limit: float = 20.0  # seconds a case, after which even fewer rounds are enough
    only_losers: bool = False  # the table shows those alone; the JSON has every case
    needs: str = ""  # a package that its cases cannot do without


_LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
_CONTEXTS = (512, 1024, 2048, 4096, 8192, 16384, 32768)

_FEED_FORWARD = [
    *linear.LINEAR,
    *feed_forward.FEED_FORWARD,
    *gated_feed_forward.GATED_FEED_FORWARD,
    *linear_cross_entropy.LINEAR_CROSS_ENTROPY,
]
_FEED_FORWARD_QUICK = [
    *linear.LINEAR_QUICK,
    *feed_forward.FEED_FORWARD_QUICK,
    *gated_feed_forward.GATED_FEED_FORWARD_QUICK,
    *linear_cross_entropy.LINEAR_CROSS_ENTROPY_QUICK,
]

# By name: the whole and the quick version. A new suite is a line here and a file of cases.
SUITES: dict[str, tuple[Suite, Suite]] = {
    "attention": (Suite(attention.ATTENTION, 1.5), Suite(attention.ATTENTION_QUICK, 0.8)),
    "varlen": (Suite(attention_varlen.VARLEN, 3.0), Suite(attention_varlen.VARLEN_QUICK, 1.0)),
    "decode": (Suite(attention_decode.DECODE, 1.5), Suite(attention_decode.DECODE_QUICK, 0.8)),
    "ffn": (Suite(_FEED_FORWARD, 1.5), Suite(_FEED_FORWARD_QUICK, 0.8)),
    "norm": (
        Suite([*layer_norm.LAYER_NORM, *rms_norm.RMS_NORM], 1.5),
        Suite([*layer_norm.LAYER_NORM_QUICK, *rms_norm.RMS_NORM_QUICK], 0.8),
    ),
    "rotary": (Suite(rotary.ROTARY, 1.5), Suite(rotary.ROTARY_QUICK, 0.8)),
    "model": (
        Suite(model.MODEL, 6.0, limit=30.0, needs="transformers"),
        Suite(model.MODEL_QUICK, 3.0, 3, needs="transformers"),
    ),
    "models": (
        Suite(own_model.OWN_MODELS, 6.0, limit=30.0, needs="transformers"),
        Suite(own_model.OWN_MODELS_QUICK, 3.0, 3, needs="transformers"),
    ),
    "sweep": (
        Suite([*attention.sweep(_LENGTHS), *attention_decode.sweep(_CONTEXTS)], 1.0, 3, 10.0),
        Suite([*attention.sweep(_LENGTHS[:4]), *attention_decode.sweep(_CONTEXTS[:5:2])], 0.3, 3, 3.0),
    ),
    "grid": (
        Suite(attention.GRID, 0.1, 3, 1.0, only_losers=True),
        Suite(attention.GRID_QUICK, 0.05, 3, 1.0, only_losers=True),
    ),
}

ALL = ("attention", "varlen", "decode", "ffn")  # what `all` means


def choose(names: Sequence[str], quick: bool, only: str = "") -> list[Suite]:
    """The suites of these names, with the cases whose name, type or op has the text, each case once."""
    chosen = [SUITES[name][quick] for name in names]
    # Of two that are the same, the last one has a place in a plot.
    last = {(case.name, case.dtype): case for suite in chosen for case in suite.cases}
    return [
        replace(suite, cases=cases)
        for suite in chosen
        if (cases := [c for c in suite.cases if last[c.name, c.dtype] is c and only in f"{c.name} {c.dtype}"])
    ]
