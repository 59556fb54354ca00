"""`fastattn.pack`: weights in the layout that the kernels read fastest.

A kernel reads a weight [out, in] fastest where each row's numbers lie side by side. transformers' Conv1D
keeps [in, out], whose rows, seen as [out, in], are strided. Packing changes how the one parameter that there
is lies in memory. There is no second copy, so nothing can be out of date.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from fastattn.integrations.accelerate.structure import is_conv1d
from fastattn.ops._checks import TYPES

M = TypeVar("M", bound=nn.Module)

# The weights [out, in] that torch.nn.MultiheadAttention has besides its linear layer.
_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def pack(module: M) -> M:
    """Lays out the weights of a module's linear layers as the kernels read them fastest, in place.

    A matter of strides: each parameter stays the same object, with its name, shape and values. It is good
    for inference and training, and on every processor. docs/nn.md tells what happens to it afterwards.

    Left as they are: weights that lie well already, such as those of torch.nn.Linear; weights that share
    their memory with another tensor of the module that is read otherwise, or with another process; weights
    that are quantised, of a tensor subclass, on the meta device or on a GPU.

    Args:
        module: with linear layers, of torch.nn or fastattn.nn, or Conv1D of transformers. Pack it before
            it is compiled or wrapped for distributed training.
    Returns:
        The module.
    Raises:
        TypeError: it is no module.

    Example:
        >>> model = fastattn.pack(AutoModelForCausalLM.from_pretrained("openai-community/gpt2"))
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    pack_weights(module, module.modules())
    return module


def pack_weights(root: nn.Module, modules: Iterable[nn.Module]) -> Callable[[], None]:
    """Packs the weights of these modules of root; returns what gives them their strides back."""
    readings = _readings(root)
    before = []
    for weight in _weights(modules):
        parameter = weight.parameter
        if not _is_plain(parameter) or parameter.ndim != 2 or weight.is_packed(parameter):
            continue
        if _owns_memory(parameter) and readings[_address(parameter)] == {(id(parameter), weight.transposed)}:
            before.append((weight, parameter.shape, parameter.stride()))
            _lay_out(parameter, weight.packed_strides(parameter))

    def undo() -> None:
        for weight, shape, strides in before:
            parameter = weight.parameter
            # What somebody else has put there since stays as it is.
            if _is_plain(parameter) and parameter.shape == shape and weight.is_packed(parameter):
                _lay_out(parameter, strides)

    return undo


class _Weight(NamedTuple):
    """Where a weight hangs, and how it is read."""

    module: nn.Module
    name: str
    transposed: bool  # its shape is [in, out]

    @property
    def parameter(self) -> Tensor | None:
        """The one of now; None where there is none, or it is computed."""
        return self.module._parameters.get(self.name)

    def is_packed(self, parameter: Tensor) -> bool:
        """Whether it is [out, in] row by row."""
        return (parameter.t() if self.transposed else parameter).is_contiguous()

    def packed_strides(self, parameter: Tensor) -> tuple[int, int]:
        rows, columns = parameter.shape
        return (1, rows) if self.transposed else (columns, 1)


def _weights(modules: Iterable[nn.Module]) -> Iterator[_Weight]:
    for module in modules:
        if is_conv1d(module):
            yield _Weight(module, "weight", transposed=True)
        elif isinstance(module, nn.Linear):
            yield _Weight(module, "weight", transposed=False)
        elif isinstance(module, nn.MultiheadAttention):
            yield from (_Weight(module, name, transposed=False) for name in _PROJECTIONS)


def _readings(root: nn.Module) -> dict[int, set[tuple[int, bool]]]:
    """For each piece of memory: which tensors of the module lie in it, and whether [in, out] is what is read.

    So a weight that is tied to another layer's is packed only where it lies well for both.
    """
    found: dict[int, set[tuple[int, bool]]] = defaultdict(set)
    for module in root.modules():
        transposed = is_conv1d(module)
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if _is_plain(tensor):
                found[_address(tensor)].add((id(tensor), transposed and name == "weight"))
    return found


def _is_plain(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Whether it is nothing but numbers in memory."""
    return (
        type(tensor) in (nn.Parameter, Tensor)
        and tensor.dtype in TYPES  # type: ignore[union-attr]
        and tensor.layout is torch.strided  # type: ignore[union-attr]
        and tensor.is_cpu  # type: ignore[union-attr]
    )


def _owns_memory(tensor: Tensor) -> bool:
    """Whether it fills its storage, and no other process sees that."""
    storage = tensor.untyped_storage()
    return storage.nbytes() == tensor.numel() * tensor.element_size() and not tensor.is_shared()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _lay_out(parameter: Tensor, strides: tuple[int, ...]) -> None:
    """The same numbers in new memory; the old memory is released."""
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        data = parameter.data
        parameter.data = torch.empty_strided(data.shape, strides, dtype=data.dtype).copy_(data)
