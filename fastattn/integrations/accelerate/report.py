"""What `accelerate` did, layer by layer."""

from typing import NamedTuple


class LayerReport(NamedTuple):
    """What became of one attention layer."""

    name: str
    kind: str  # its class
    served: bool  # whether its attention is sent to fastattn
    calls: int  # how many fastattn computed since `accelerate`, outside of compiled graphs
    note: str  # why it is not served, or not always


class Report(list[LayerReport]):
    """One `LayerReport` per attention layer. Prints as a table."""

    def __str__(self) -> str:
        names = max(len("layer"), *(len(x.name) for x in self))
        kinds = max(len("class"), *(len(x.kind) for x in self))
        lines = [f"{'layer':{names}}  {'class':{kinds}}  served  calls  note"]
        for name, kind, served, calls, note in self:
            yes = "yes" if served else "no"
            lines.append(f"{name:{names}}  {kind:{kinds}}  {yes:6}  {calls:5}  {note}".rstrip())
        total = sum(x.calls for x in self)
        count = sum(x.served for x in self)
        lines.append(f"{count} of {len(self)} attention layers served, {total} calls")
        return "\n".join(lines)

    __repr__ = __str__
