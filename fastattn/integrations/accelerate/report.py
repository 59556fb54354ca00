"""What `accelerate` did, layer by layer."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple

Part = Literal["attention", "rotary", "mlp", "linear", "norm", "loss"]


class LayerReport(NamedTuple):
    """What became of one layer."""

    name: str
    part: Part
    kind: str  # its class
    ops: str  # what runs in its place: "feed_forward"; "" where it was left alone
    calls: int  # how many fastattn computed since `accelerate`, outside of compiled graphs
    note: str  # why it is not served, or not always

    @property
    def served(self) -> bool:
        return bool(self.ops)


_HEAD = ("layer", "part", "class", "runs", "calls", "note")


class Report(list[LayerReport]):
    """One `LayerReport` per layer. Prints as a table, in which alike layers share a line."""

    def of(self, part: Part) -> "Report":
        """The layers of one part."""
        return Report(layer for layer in self if layer.part == part)

    def __str__(self) -> str:
        rows = [_HEAD, *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = []
        for *columns, calls, note in rows:
            cells = [f"{cell:{width}}" for cell, width in zip(columns, widths, strict=True)]
            lines.append(f"{'  '.join(cells)}  {calls:>5}  {note}".rstrip())
        return "\n".join([*lines, self._total()])

    __repr__ = __str__

    def _rows(self) -> Iterator[tuple[str, str, str, str, str, str]]:
        """Layers that differ in the numbers in their names alone, in one row, where the first one stands."""
        alike: dict[tuple[str, ...], list[LayerReport]] = {}
        for layer in self:
            key = (re.sub(r"\d+", "*", layer.name), layer.part, layer.kind, layer.ops, layer.note)
            alike.setdefault(key, []).append(layer)
        for layers in alike.values():
            first = layers[0]
            calls = str(sum(layer.calls for layer in layers))
            name = _shared_name([layer.name for layer in layers])
            yield name or "(model)", first.part, first.kind, first.ops or "-", calls, first.note

    def _total(self) -> str:
        parts = [
            f"{sum(layer.served for layer in layers)} of {len(layers)} {part}"
            for part, layers in ((part, self.of(part)) for part in dict.fromkeys(x.part for x in self))
        ]
        return f"{', '.join(parts)} layers served, {sum(layer.calls for layer in self)} calls"


def _shared_name(names: list[str]) -> str:
    """ "h.0-11.mlp" for "h.0.mlp" ... "h.11.mlp": what stands in all of them, and the numbers that differ."""
    pieces = [re.split(r"(\d+)", name) for name in names]
    return "".join(
        column[0] if len(set(column)) == 1 else _ranges(sorted({int(number) for number in column}))
        for column in zip(*pieces, strict=True)
    )


def _ranges(numbers: list[int]) -> str:
    """ "0-2,5" for 0, 1, 2, 5."""
    runs = groupby(enumerate(numbers), key=lambda entry: entry[1] - entry[0])
    spans = [[number for _, number in run] for _, run in runs]
    return ",".join(str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans)
