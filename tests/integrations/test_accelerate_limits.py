"""accelerate: what is left alone, and why; what changes after it; the loss, which it takes on request."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastattn
from fastattn.testing.compare import assert_close

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(7))
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(8))


class LoraLinear(nn.Module):
    """As PEFT's: the linear layer that it wraps, and two small ones beside it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, base_layer.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Mlp(nn.Module):
    def __init__(self, activation: Any = F.gelu, dropout: Any = None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.act, self.drop = activation, dropout or nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.fc1(x))
        return self.drop(self.fc2(x))


class ClippedMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)).clamp(max=2.0))


class Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class WhitenedRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x - x.mean(-1, keepdim=True))


class Subclass(Tensor):
    """As weights that are quantised or spread over devices."""


def _mlp(**options: Any) -> Mlp:
    torch.manual_seed(0)
    return Mlp(**options)


def _served(handle: Any) -> dict[str, str]:
    return {row.name: row.ops for row in handle.report()}


def _note(handle: Any, name: str = "") -> str:
    return next(row.note for row in handle.report() if row.name == name)


class TestLeftAlone:
    @pytest.mark.parametrize("activation", [F.gelu, F.relu, nn.GELU("tanh"), nn.SiLU(), nn.Tanh()], ids=str)
    def test_activations_by_their_values(self, activation: Any) -> None:
        model = _mlp(activation=activation)
        expected, truth = model(X), copy.deepcopy(model).double()(X.double())
        with fastattn.accelerate(model) as handle:
            assert_close(model(X).detach(), expected.detach(), truth.detach())
            assert _served(handle) == {"": "feed_forward"}

    @pytest.mark.parametrize(
        ("activation", "why"),
        [
            (nn.Mish(), "no op has its activation Mish"),
            (nn.Hardtanh(-10.0, 10.0), "no op has its activation Hardtanh"),
            (nn.PReLU(), "activation PReLU is not known"),
            (Gelu(), "activation Gelu is not known"),
            (lambda x: F.gelu(x), "activation <lambda> is not known"),
        ],
    )
    def test_other_activations(self, activation: Any, why: str) -> None:
        model = _mlp(activation=activation)
        with fastattn.accelerate(model) as handle:
            model(X)
            assert _served(handle) == {"": "", "fc1": "linear", "fc2": "linear"}
            assert why in _note(handle)
            assert handle.report()[1].calls == 1

    def test_other_formulas(self) -> None:
        with fastattn.accelerate(nn.ModuleList([ClippedMlp(), WhitenedRMSNorm()])) as handle:
            assert _served(handle) == {"0": "", "0.fc1": "linear", "0.fc2": "linear", "1": ""}
            assert "none of the formulas known" in _note(handle, "0")
            assert "none of the formulas known" in _note(handle, "1")

    def test_formulas_are_those_of_the_instance(self) -> None:
        model = _mlp()
        model.forward = lambda x: x  # type: ignore[method-assign]
        with fastattn.accelerate(model) as handle:
            assert torch.equal(model(X), X)
            assert "replaced already" in _note(handle)

    def test_other_linears(self) -> None:
        model = nn.Sequential(
            ScaledLinear(16, 16),
            parametrizations.weight_norm(nn.Linear(16, 16)),
            torch.nn.utils.parametrizations.orthogonal(nn.Linear(16, 16)),
            nn.Linear(16, 16),
            nn.Bilinear(2, 2, 2),
        )
        model[3].weight = nn.Parameter(model[3].weight.detach().as_subclass(Subclass))
        with fastattn.accelerate(model) as handle:
            assert _served(handle) == {"0": "", "1": "", "2": "", "3": ""}
            assert "is a ScaledLinear, which has a forward of its own" in _note(handle, "0")
            assert "ParametrizedLinear" in _note(handle, "1")
            assert "its weight is a Subclass" in _note(handle, "3")

    def test_other_norms(self) -> None:
        model = nn.ModuleList([nn.LayerNorm((2, 16)), nn.RMSNorm(16), nn.RMSNorm(16, eps=1e-5)])
        with fastattn.accelerate(model) as handle:
            assert _served(handle) == {"0": "", "1": "", "2": "rms_norm"}
            assert "over 2 dimensions" in _note(handle, "0")
            assert "eps is None" in _note(handle, "1")

    def test_other_dropouts(self) -> None:
        with fastattn.accelerate(_mlp(dropout=nn.AlphaDropout(0.1))) as handle:
            assert "AlphaDropout where a dropout is expected" in _note(handle)

    def test_weights_of_different_types(self) -> None:
        model = _mlp()
        model.fc2.double()
        with fastattn.accelerate(model) as handle:
            assert "different types" in _note(handle)

    def test_inside_fastattns_own_modules(self) -> None:
        own = fastattn.nn.MultiheadAttention(16, 4, batch_first=True)
        with fastattn.accelerate(nn.ModuleList([own, nn.Linear(2, 2)])) as handle:
            assert _served(handle) == {"0": "", "1": "linear"}


class TestLora:
    def test_wrapped_linears(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        for layer in model.model.layers:
            layer.mlp.up_proj = LoraLinear(layer.mlp.up_proj)
            layer.self_attn.q_proj = LoraLinear(layer.self_attn.q_proj)
        with torch.no_grad():
            expected = model(IDS).logits
            truth = copy.deepcopy(model).double()(IDS).logits
            with fastattn.accelerate(model) as handle:
                assert_close(model(IDS).logits, expected, truth)
                assert "up_proj is a LoraLinear" in _note(handle, "model.layers.0.mlp")
                linears = {row.name: row.calls for row in handle.report().of("linear")}
                assert all(calls == 1 for calls in linears.values())
                inside = [name for name in linears if name.startswith("model.layers.0.mlp.")]
                assert [name.removeprefix("model.layers.0.mlp.") for name in inside] == [
                    "gate_proj", "up_proj.base_layer", "up_proj.lora_A", "up_proj.lora_B", "down_proj"
                ]  # fmt: skip
            assert torch.equal(model(IDS).logits, expected)

    def test_wrapped_afterwards(self) -> None:
        model = _mlp()
        with fastattn.accelerate(model) as handle:
            model.fc1 = LoraLinear(model.fc1)
            model.fc1.lora_A.weight.grad = None
            out = model(X)
            out.sum().backward()
            assert model.fc1.lora_A.weight.grad is not None
            assert "exchanged" in _note(handle)


class TestFilter:
    def test_parts_are_asked_for_one_by_one(self, new_model: Callable[..., Any]) -> None:
        model = new_model("gpt2")
        asked: list[str] = []

        def choice(module: nn.Module, name: str) -> bool:
            asked.append(name)
            return type(module).__name__ != "GPT2MLP"

        with torch.no_grad(), fastattn.accelerate(model, filter_fn=choice) as handle:
            model(IDS)
            rows = {row.name: row for row in handle.report()}
            assert rows["transformer.h.0.mlp"].note == "left out by filter_fn"
            assert rows["transformer.h.0.mlp.c_fc"].calls == 1
            assert {"transformer.h.0.mlp", "transformer.h.0.mlp.c_fc", "transformer.h.1.ln_1"} <= set(asked)

    def test_nothing_chosen(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        before = model(IDS).logits
        with fastattn.accelerate(model, filter_fn=lambda *_: False) as handle:
            assert torch.equal(model(IDS).logits, before)
            assert not any(row.served for row in handle.report())


class TestAfterwards:
    def test_hooks_inside_are_called(self) -> None:
        model = _mlp()
        seen: list[Tensor] = []
        with fastattn.accelerate(model) as handle:
            removable = model.fc1.register_forward_hook(lambda *args: seen.append(args[2]))
            model(X)
            assert len(seen) == 1
            assert "has hooks" in _note(handle)
            removable.remove()
            model(X)
            assert len(seen) == 1
            assert handle.report()[0].calls == 1

    def test_hooks_before(self) -> None:
        model = _mlp()
        model.fc1.register_forward_hook(lambda *_: None)
        with fastattn.accelerate(model) as handle:
            assert "fc1 has hooks" in _note(handle)
            assert _served(handle) == {"": "", "fc1": "linear", "fc2": "linear"}

    def test_hooks_on_the_layer_itself(self) -> None:
        model = _mlp()
        with fastattn.accelerate(model) as handle:
            model.register_forward_hook(lambda *args: args[2] + 1.0)
            assert (model(X) - Mlp.forward(model, X) - 1.0).abs().max() < 0.5
            assert handle.report()[0].calls == 1

    def test_weights_are_looked_up_at_each_call(self) -> None:
        model, other = _mlp(), _mlp()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2.0)
        with fastattn.accelerate(model) as handle:
            model.load_state_dict(other.state_dict(), assign=True)
            expected, truth = other(X), copy.deepcopy(other).double()(X.double())
            assert_close(model(X).detach(), expected.detach(), truth.detach())
            assert handle.report()[0].calls == 1

    def test_what_no_op_takes_is_torchs(self) -> None:
        model = _mlp()
        with fastattn.accelerate(model) as handle:
            with pytest.raises(RuntimeError, match="mat1 and mat2"):  # torch's own words
                model(X[..., :3])
            assert "1 to torch" in _note(handle)
            assert torch.equal(model(x=X), Mlp.forward(model, X))
            assert "by name" in _note(handle)

    def test_replaced_by_somebody_else(self) -> None:
        model = nn.Linear(16, 16)
        expected = model(X)
        handle = fastattn.accelerate(model)
        inner = model.forward
        model.forward = lambda x: inner(x)  # type: ignore[method-assign]
        handle.remove()
        assert torch.equal(model(X), expected)
        assert "forward" in model.__dict__

    def test_parts_of_an_accelerated_model(self) -> None:
        model = nn.Sequential(_mlp())
        with fastattn.accelerate(model), pytest.raises(ValueError, match="accelerated already"):
            fastattn.accelerate(model[0])


class TestLoss:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "qwen3"])
    @pytest.mark.parametrize("items", [None, 5, torch.tensor(5)], ids=["mean", "int", "tensor"])
    def test_loss_and_gradients(self, new_model: Callable[..., Any], name: str, items: Any) -> None:
        model = new_model(name)
        model.set_attn_implementation("eager")  # the one that knows Gemma's softcap, but for ours
        labels = IDS.masked_fill(IDS % 5 == 0, -100)
        options = {} if items is None else {"num_items_in_batch": items}

        def run(model: Any) -> tuple[Any, dict[str, Tensor]]:
            model.zero_grad()
            output = model(IDS, labels=labels, **options)
            output.loss.backward()
            return output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

        truth, exact_grads = run(copy.deepcopy(model).double())
        before, base_grads = run(model)
        with fastattn.accelerate(model, loss=True) as handle:
            output, grads = run(model)
            assert output.logits is None
            assert [row.calls for row in handle.report().of("loss")] == [1]
            assert model(IDS).logits.shape == before.logits.shape
            assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (2, 9)
            assert "_loss_function" not in model.__dict__
        assert_close(output.loss.detach(), before.loss.detach(), truth.loss.detach().double())
        for key, grad in grads.items():
            assert_close(grad, base_grads[key], exact_grads[key].double(), key)
        assert torch.equal(run(model)[0].logits, before.logits)

    def test_tuples(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        with fastattn.accelerate(model, loss=True):
            loss, logits, *_ = model(IDS, labels=IDS, return_dict=False)
            assert loss.ndim == 0 and logits is None

    def test_only_on_request(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        with fastattn.accelerate(model) as handle:
            assert model(IDS, labels=IDS).logits is not None
            (row,) = handle.report().of("loss")
            assert (row.served, row.note) == (False, "only with loss=True")

    def test_models_that_use_their_logits_otherwise(self, new_model: Callable[..., Any]) -> None:
        model = new_model("t5")
        with fastattn.accelerate(model, loss=True) as handle:
            assert model(IDS, labels=IDS).logits is not None
            (row,) = handle.report().of("loss")
            assert "nothing but a loss" in row.note

    def test_other_losses_and_hooked_heads(self, new_model: Callable[..., Any]) -> None:
        model = new_model("llama")
        with fastattn.accelerate(model, loss=True) as handle:
            model.loss_function = lambda logits, labels, **_: logits.sum()
            assert model(IDS, labels=IDS).logits is not None
            del model._loss_function
            removable = model.lm_head.register_forward_hook(lambda *_: None)
            assert model(IDS, labels=IDS).logits is not None
            removable.remove()
            assert model(IDS, labels=IDS).logits is None
            assert [row.calls for row in handle.report().of("loss")] == [1]
