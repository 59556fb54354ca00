"""The loss curve as a PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
_TRAIN, _VALID = "#0a84d6", "#e8710a"
_SMOOTH = 0.05  # share of the newest step in the line; the steps themselves are pale


def draw(lines: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """The training loss of each step and the validation loss of each evaluation of a log."""
    steps = [x for x in lines if "loss" in x]
    valid = [x for x in lines if "valid_loss" in x]
    smooth: list[float] = []
    for i, x in enumerate(steps):
        share = max(_SMOOTH, 1.0 / (i + 1))  # a plain mean at first
        smooth.append(x["loss"] if not smooth else smooth[-1] + share * (x["loss"] - smooth[-1]))
    with matplotlib.rc_context(_STYLE):
        # A figure without pyplot: it needs no display and no choice of a backend.
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        at = [x["tokens"] / 1e6 for x in steps]
        axes.plot(at, [x["loss"] for x in steps], color=_TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(at, smooth, color=_TRAIN, linewidth=1.8, label="training")
        axes.plot(
            [x["tokens"] / 1e6 for x in valid], [x["valid_loss"] for x in valid], color=_VALID, marker="o",
            markersize=3.5, linewidth=1.4, label="held back",
        )  # fmt: skip
        axes.set_xlabel("million tokens")
        axes.set_ylabel("cross entropy, nats per token")
        axes.set_title(title, loc="left", fontsize=10)
        axes.grid(axis="y", alpha=0.2)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=160, format="png")
