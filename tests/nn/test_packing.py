"""`fastattn.pack`: the layout changes, and nothing else does, whatever happens to the parameter later."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastattn
from fastattn.testing.compare import assert_close

X = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1))


class Conv1D(nn.Module):
    """With the forward of transformers', which may be absent here."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf, generator=torch.Generator().manual_seed(nf)))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


def _model() -> nn.Sequential:
    return nn.Sequential(Conv1D(8, 6), nn.GELU(), Conv1D(6, 8))


def _transposed(shape: tuple[int, int]) -> nn.Parameter:
    """Of this shape, column by column in memory."""
    return nn.Parameter(torch.randn(*reversed(shape)).t())


def _is_packed(weight: Tensor, transposed: bool = True) -> bool:
    rows = weight.t() if transposed else weight
    return rows.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes


def _ours(weight: Tensor, x: Tensor = X) -> Tensor:
    """What an op computes from a Conv1D's weight."""
    backend = "reference" if weight.dtype is torch.float64 else None
    return fastattn.linear(x.to(weight.dtype), weight.t(), backend=backend)


class TestLayout:
    def test_strides_alone_change(self) -> None:
        model = _model()
        weight = model[0].weight
        before, address = weight.detach().clone(), weight.data_ptr()
        assert fastattn.pack(model) is model
        assert model[0].weight is weight
        assert weight.requires_grad and weight.is_leaf
        assert torch.equal(weight, before)
        assert (weight.shape, weight.stride()) == ((6, 8), (1, 6))
        assert weight.data_ptr() != address
        assert weight.untyped_storage().nbytes() == before.nbytes  # and no other tensor was kept

    def test_no_second_copy_is_kept(self) -> None:
        model = _model()
        fastattn.pack(model)
        tensors = [x for module in model.modules() for x in vars(module).values() if isinstance(x, Tensor)]
        assert not tensors
        assert len(model.state_dict()) == 4

    def test_again_changes_nothing(self) -> None:
        model = fastattn.pack(_model())
        addresses = [x.data_ptr() for x in model.parameters()]
        fastattn.pack(model)
        assert [x.data_ptr() for x in model.parameters()] == addresses

    def test_what_lies_well_is_left(self) -> None:
        model = nn.Sequential(nn.Linear(6, 8), fastattn.nn.FeedForward(8, 16), nn.LayerNorm(8))
        addresses = [x.data_ptr() for x in model.parameters()]
        fastattn.pack(model)
        assert [x.data_ptr() for x in model.parameters()] == addresses

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.Linear(6, 8),
            lambda: fastattn.nn.Linear(6, 8),
            lambda: fastattn.nn.FeedForward(6, 8),
            lambda: fastattn.nn.GatedFeedForward(6, 8),
            lambda: fastattn.nn.LinearCrossEntropyLoss(6, 8),
            lambda: nn.MultiheadAttention(6, 2),
            lambda: fastattn.nn.MultiheadAttention(6, 2, kdim=4, vdim=4),
            lambda: fastattn.nn.TransformerEncoderLayer(6, 2, 8),
        ],
        ids=["Linear", "ours", "mlp", "gated", "loss", "torch's attention", "attention", "encoder"],
    )
    def test_weights_by_columns_become_rows(self, make: Callable[[], nn.Module]) -> None:
        module = make()
        weights = [x for x in module.parameters() if x.ndim == 2]
        for x in weights:
            x.data = x.data.t().contiguous().t()
        before = copy.deepcopy(module.state_dict())
        fastattn.pack(module)
        assert all(_is_packed(x, transposed=False) for x in weights)
        assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_types(self, dtype: torch.dtype) -> None:
        model = _model().to(dtype)
        before = model[0].weight.detach().clone()
        assert _is_packed(fastattn.pack(model)[0].weight)
        assert torch.equal(model[0].weight, before)

    def test_made_and_packed_in_inference_mode(self) -> None:
        with torch.inference_mode():
            model = fastattn.pack(_model())
        assert _is_packed(model[0].weight)
        model = _model()
        with torch.inference_mode():
            fastattn.pack(model)
        _ours(model[0].weight).sum().backward()
        assert model[0].weight.grad is not None


class TestLeftAlone:
    @pytest.mark.parametrize("bad", [None, "model", torch.zeros(2, 2), nn.Linear])
    def test_no_module(self, bad: Any) -> None:
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got"):
            fastattn.pack(bad)

    def test_tied_to_an_embedding(self) -> None:
        model = nn.ModuleDict({"table": nn.Embedding(6, 8), "out": Conv1D(8, 6)})
        model["out"].weight = model["table"].weight
        address = model["table"].weight.data_ptr()
        fastattn.pack(model)
        assert model["out"].weight is model["table"].weight
        assert model["table"].weight.data_ptr() == address
        assert model["table"].weight.is_contiguous()

    def test_tied_with_one_reading(self) -> None:
        """Two Conv1D that share a weight still do; so do an embedding and a linear layer."""
        model = nn.Sequential(Conv1D(6, 6), Conv1D(6, 6), nn.Embedding(6, 4), nn.Linear(4, 6))
        model[1].weight = model[0].weight
        model[2].weight = model[3].weight = _transposed((6, 4))
        fastattn.pack(model)
        assert model[1].weight is model[0].weight and model[3].weight is model[2].weight
        assert _is_packed(model[0].weight) and _is_packed(model[3].weight, transposed=False)

    def test_parameters_that_share_memory(self) -> None:
        model = _model()
        whole = torch.randn(2, 6, 8)
        model[0].weight.data, model.copy = whole[0], nn.Parameter(whole[1])
        alias = Conv1D(8, 6)
        alias.weight.data = model[2].weight.data.view(6, 8)
        model.append(alias)
        fastattn.pack(model)
        assert model[0].weight.is_contiguous() and model[2].weight.is_contiguous()
        assert alias.weight.data_ptr() == model[2].weight.data_ptr()

    def test_shared_with_other_processes(self) -> None:
        model = _model().share_memory()
        fastattn.pack(model)
        assert all(x.is_shared() and x.is_contiguous() for x in model.parameters())

    def test_meta(self) -> None:
        model = fastattn.pack(_model().to("meta"))
        assert model[0].weight.is_contiguous()

    def test_quantised_lazy_and_subclassed(self) -> None:
        class Marked(nn.Parameter):
            pass

        model = nn.Sequential(*(Conv1D(8, 6) for _ in range(2)), nn.LazyLinear(3))
        model[0].weight = nn.Parameter(torch.zeros(6, 8, dtype=torch.int8), requires_grad=False)
        model[1].weight = Marked(torch.zeros(6, 8))
        fastattn.pack(model)
        assert model[0].weight.is_contiguous() and model[1].weight.is_contiguous()

    def test_parametrised(self) -> None:
        model = _model()
        nn.utils.parametrizations.weight_norm(model[0])
        fastattn.pack(model)
        assert model(X).shape == X.shape

    def test_a_forward_of_its_own(self) -> None:
        class Other(Conv1D):
            def forward(self, x: Tensor) -> Tensor:
                return x @ self.weight.view(6, 8)

        assert fastattn.pack(Other(8, 6))(X).shape == (2, 3, 8)


class TestNothingIsOutOfDate:
    """Each change of a parameter is seen by the next call: there is one parameter."""

    def _check(self, model: nn.Module, packed: bool = True) -> None:
        weight = model[0].weight  # type: ignore[index]
        assert _is_packed(weight) == packed
        if weight.dtype is not torch.float64:
            truth = F.linear(X.to(weight.dtype).double(), weight.detach().t().double())
            assert_close(_ours(weight).detach(), F.linear(X.to(weight.dtype), weight.t()).detach(), truth)

    def test_in_place_and_data(self) -> None:
        model = fastattn.pack(_model())
        before = _ours(model[0].weight)
        with torch.no_grad():
            model[0].weight.mul_(2.0)
        self._check(model)
        assert not torch.equal(_ours(model[0].weight), before)
        model[0].weight.data.fill_(0.5)
        self._check(model)
        model[0].weight.data[1:].copy_(torch.randn(5, 8))
        self._check(model)

    def test_other_strides_are_right_and_can_be_packed_again(self) -> None:
        model = fastattn.pack(_model())
        model[0].weight.data = torch.randn(6, 8)
        self._check(model, packed=False)
        self._check(fastattn.pack(model))
        model.load_state_dict(_model().state_dict(), assign=True)
        self._check(model, packed=False)
        self._check(fastattn.pack(model))

    def test_load_state_dict(self) -> None:
        model, other = fastattn.pack(_model()), _model()
        nn.init.normal_(other[0].weight)
        model.load_state_dict(other.state_dict())
        self._check(model)
        assert torch.equal(model[0].weight, other[0].weight)
        other.load_state_dict(model.state_dict())
        assert other[0].weight.is_contiguous()

    @pytest.mark.parametrize("move", [lambda m: m.to(torch.bfloat16), lambda m: m.double()])
    def test_casts(self, move: Callable[[nn.Module], nn.Module]) -> None:
        self._check(move(fastattn.pack(_model())))

    @pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
    @pytest.mark.parametrize("first", ["optimizer", "pack"])
    def test_optimizers(self, kind: Any, first: str) -> None:
        """The same steps as without packing."""
        models = truth, plain, packed = _model().double(), _model(), _model()
        if first == "pack":
            fastattn.pack(packed)
        optimizers = [kind(model.parameters(), lr=0.01) for model in models]
        fastattn.pack(packed)
        for _ in range(3):
            for model, optimizer in zip(models, optimizers, strict=True):
                optimizer.zero_grad()
                _ours(model[0].weight).square().mean().backward()
                optimizer.step()
        assert_close(packed[0].weight.data, plain[0].weight.data, truth[0].weight.data)
        self._check(packed)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies(self, how: str) -> None:
        model = fastattn.pack(_model())
        if how == "deepcopy":
            other = copy.deepcopy(model)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model.state_dict(), file)
            other = _model()
            other.load_state_dict(torch.load(io.BytesIO(file.getvalue())), assign=True)
        self._check(other)
        assert torch.equal(other[0].weight, model[0].weight)
        assert other[0].weight.data_ptr() != model[0].weight.data_ptr()

    def test_a_checkpoint_has_the_old_shapes(self) -> None:
        plain, packed = _model().state_dict(), fastattn.pack(_model()).state_dict()
        assert {name: x.shape for name, x in packed.items()} == {name: x.shape for name, x in plain.items()}
        assert all(torch.equal(x, plain[name]) for name, x in packed.items())


@pytest.mark.parametrize("backward", [False, True])
def test_kernels_compute_the_same_from_both_layouts(backward: bool, check_op: Callable[..., None]) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(40, 24, generator=generator)
    fastattn.pack(model := nn.Sequential(conv := Conv1D(24, 40)))
    conv.weight.data.copy_(weight)
    assert _is_packed(model[0].weight)
    given = {"x": torch.randn(5, 40, generator=generator), "bias": torch.randn(24, generator=generator)}
    for stored in (weight, conv.weight.detach()):
        check_op("linear", {**given, "weight": stored.t()}, gradients=backward)
