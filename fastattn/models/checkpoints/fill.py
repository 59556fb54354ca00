"""From a family, a config and stored tensors to a model. All is checked before a weight is read."""

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from fastattn.models.checkpoints.family import Family, Piece, parameters
from fastattn.models.checkpoints.folder import Stored
from fastattn.models.config import ModelConfig
from fastattn.models.pretrained import Pretrained


class Source(Protocol):
    """Where tensors come from."""

    stored: dict[str, Stored]

    def read(self, stored: Stored) -> Tensor:
        """In memory of its own, or to be copied."""


def fill(
    family: Family,
    config: ModelConfig,
    source: Source,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Pretrained:
    """A model with the source's weights; each is read, brought into its type and place, and forgotten."""
    with _weightless():
        model = family.model(config)
    once, again = parameters(model)
    pieces = {name: list(family.pieces(name, parameter, config)) for name, parameter in once.items()}
    copies = {name: list(family.pieces(name, once[first], config)) for name, first in again.items()}
    names = family.full_names(source.stored)
    stored = {names[name]: place for name, place in source.stored.items()}
    _check(family, source.stored, stored, pieces, copies)
    if dtype is None:
        types = (stored[piece.name].dtype for parts in pieces.values() for piece in parts)
        dtype = reduce(torch.promote_types, filter(None, types))

    def read(parameter: Tensor, parts: list[Piece]) -> nn.Parameter:
        value = torch.empty(parameter.shape, dtype=dtype, device=device)
        for piece in parts:
            value[piece.rows] = piece.order.read(source.read(stored[piece.name]), config)
        return nn.Parameter(value, parameter.requires_grad)

    weights = {name: read(parameter, pieces[name]) for name, parameter in once.items()}
    for name, first in again.items():
        weights[name] = weights[first]
        has_copy = all(piece.name in stored for piece in copies[name])
        if has_copy and not torch.equal(read(once[first], copies[name]), weights[first]):
            if family.unties:
                return fill(family, replace(config, tie_embeddings=False), source, dtype, device)
            place = stored[copies[name][0].name]
            raise ValueError(f"{place.file}: {place.name} differs from {pieces[first][0].name}, its tie")
    model.load_state_dict(weights, assign=True)
    if device is not None:
        model.to(device)  # the tables
    return model.eval()


class _NoNumbers(TorchFunctionMode):
    """To draw numbers for a tensor without memory is no use, and makes torch import 70 MB of itself."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = kwargs.get("tensor")
        draws = getattr(func, "__module__", None) == nn.init.__name__
        return tensor if draws and tensor is not None and tensor.is_meta else func(*args, **kwargs)


@contextmanager
def _weightless() -> Iterator[None]:
    """Parameters of modules that this thread makes meanwhile have a shape and no memory; buffers are real."""
    thread = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        # One that is registered again is shared by two modules and must stay the same.
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type] # it may return
    try:
        with _NoNumbers():
            yield
    finally:
        handle.remove()


def _check(
    family: Family,
    as_found: Mapping[str, Stored],
    stored: Mapping[str, Stored],
    pieces: Mapping[str, list[Piece]],
    copies: Mapping[str, list[Piece]],
) -> None:
    """Raises ValueError where a tensor is missing, was not expected, or has another shape or type."""
    wanted = [piece for parts in pieces.values() for piece in parts]
    optional = [piece for parts in copies.values() for piece in parts]
    names = {piece.name for piece in wanted + optional}
    problems = [f"{piece.name} is missing" for piece in wanted if piece.name not in stored]
    for name, found in stored.items():
        if name not in names and not re.fullmatch(family.unused, name):
            problems.append(f"{found.file.name}: {found.name} was not expected")
    for piece in wanted + optional:
        found_piece = stored.get(piece.name)
        if found_piece is None:
            continue
        place = f"{found_piece.file.name}: {found_piece.name}"
        if found_piece.shape != piece.shape:
            problems.append(f"{place} must be {list(piece.shape)}, got {list(found_piece.shape)}")
        if found_piece.dtype is None:
            problems.append(f"{place} must be of a floating type, got {found_piece.kind}")
    if problems:
        where = next((x.file.parent for x in as_found.values()), "the checkpoint")
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"{where} does not fit its config: {'; '.join(problems[:5])}{more}")
