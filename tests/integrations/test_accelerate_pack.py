"""`fastattn.pack` and accelerate(pack=True) on models of transformers: layout, ties, saving, and back."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.testing.compare import assert_close

IDS = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(7))
# The Conv1D of GPT-2, by the last part of their names.
CONV1D = ("c_attn", "c_proj", "c_fc")


@pytest.fixture
def gpt2(new_model: Callable[..., Any]) -> Any:
    return new_model("gpt2")


def _packed(model: Any) -> set[str]:
    """The names of the weights whose strides are not those of their shape."""
    return {name for name, x in model.named_parameters() if not x.is_contiguous()}


def _all_conv1d(model: Any) -> set[str]:
    return {f"{name}.weight" for name, _ in model.named_modules() if name.endswith(CONV1D)}


def _strides(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: x.stride() for name, x in model.named_parameters()}


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


class TestPack:
    def test_conv1d_alone_changes(self, gpt2: Any) -> None:
        before, parameters = copy.deepcopy(gpt2.state_dict()), dict(gpt2.named_parameters())
        fastattn.pack(gpt2)
        assert _packed(gpt2) == _all_conv1d(gpt2)
        assert len(_packed(gpt2)) == 8
        assert _equal(gpt2.state_dict(), before)
        assert all(gpt2.get_parameter(name) is x for name, x in parameters.items())

    def test_ties_stay(self, gpt2: Any) -> None:
        address = gpt2.lm_head.weight.data_ptr()
        fastattn.pack(gpt2)
        assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
        assert gpt2.lm_head.weight.data_ptr() == address

    @torch.no_grad()
    def test_the_model_computes_the_same(self, gpt2: Any) -> None:
        truth, base = copy.deepcopy(gpt2).double()(IDS).logits, gpt2(IDS).logits
        fastattn.pack(gpt2)
        assert_close(gpt2(IDS).logits, base, truth)
        with fastattn.accelerate(gpt2):
            assert_close(gpt2(IDS).logits, base, truth)

    def test_a_saved_model_is_as_it_was(self, gpt2: Any, tmp_path: Path) -> None:
        """Byte for byte, since safetensors knows no strides; and a loaded one can be packed."""
        gpt2.save_pretrained(tmp_path / "plain")
        fastattn.pack(gpt2).save_pretrained(tmp_path / "packed")
        name = "model.safetensors"
        assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
        assert _packed(gpt2) == _all_conv1d(gpt2)
        loaded = type(gpt2).from_pretrained(tmp_path / "packed")
        assert not _packed(loaded)
        assert _packed(fastattn.pack(loaded)) == _all_conv1d(gpt2)
        assert _equal(loaded.state_dict(), gpt2.state_dict())

    def test_safetensors_by_hand(self, gpt2: Any, tmp_path: Path) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        fastattn.pack(gpt2)
        safetensors.save_model(gpt2, str(tmp_path / "model.safetensors"))
        other = copy.deepcopy(gpt2)
        torch.nn.init.zeros_(other.transformer.h[0].mlp.c_fc.weight)
        safetensors.load_model(other, str(tmp_path / "model.safetensors"))
        assert _equal(other.state_dict(), gpt2.state_dict())
        assert _packed(other) == _all_conv1d(gpt2)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    def test_copies(self, gpt2: Any, copied: Callable[[Any], Any]) -> None:
        other = copied(fastattn.pack(gpt2))
        assert _packed(other) == _all_conv1d(gpt2)
        assert other.lm_head.weight is other.transformer.wte.weight
        assert torch.equal(other(IDS).logits, gpt2(IDS).logits)


class TestAccelerate:
    @pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
    @torch.no_grad()
    def test_there_and_back(self, new_model: Callable[..., Any], name: str) -> None:
        model = new_model(name)
        before, strides = model(IDS)[0], _strides(model)
        state = copy.deepcopy(model.state_dict())
        truth = copy.deepcopy(model).double()(IDS)[0]
        with fastattn.accelerate(model, pack=True) as handle:
            assert _packed(model) == (_all_conv1d(model) if name == "gpt2" else set())
            assert _equal(model.state_dict(), state)
            assert_close(model(IDS)[0], before, truth)
            assert all(row.calls for row in handle.report() if row.served)
        assert _strides(model) == strides
        assert _equal(model.state_dict(), state)
        assert torch.equal(model(IDS)[0], before)

    def test_only_on_request(self, gpt2: Any) -> None:
        with fastattn.accelerate(gpt2):
            assert not _packed(gpt2)

    def test_only_layers_that_are_served(self, gpt2: Any) -> None:
        gpt2.transformer.h[1].attn.c_attn.forward = lambda x: x  # somebody else's
        with fastattn.accelerate(gpt2, pack=True, filter_fn=lambda module, name: "h.0.mlp" not in name):
            found = _packed(gpt2)
        assert found == {
            name for name in _all_conv1d(gpt2) if "h.0.mlp" not in name and "h.1.attn.c_attn" not in name
        }

    def test_values_stay_as_training_left_them(self, gpt2: Any) -> None:
        strides = _strides(gpt2)
        with fastattn.accelerate(gpt2, pack=True):
            optimizer = torch.optim.SGD(gpt2.parameters(), lr=0.1)
            gpt2(IDS, labels=IDS).loss.backward()
            weight = gpt2.transformer.h[0].mlp.c_fc.weight
            assert weight.grad.stride() == weight.stride()
            optimizer.step()
            trained = copy.deepcopy(gpt2.state_dict())
        assert _strides(gpt2) == strides
        assert _equal(gpt2.state_dict(), trained)

    def test_what_was_exchanged_meanwhile_stays(self, gpt2: Any) -> None:
        first, second = (gpt2.transformer.h[i].mlp.c_fc for i in range(2))
        handle = fastattn.accelerate(gpt2, pack=True)
        first.weight.data = torch.ones(32, 128)
        second.weight = torch.nn.Parameter(torch.ones(32, 130)[:, :128])
        gpt2.transformer.h[0].attn.c_attn.weight = None
        handle.remove()
        assert first.weight.stride() == (128, 1) and bool((first.weight == 1).all())
        assert second.weight.stride() == (130, 1)

    def test_casts_meanwhile_keep_their_type(self, gpt2: Any) -> None:
        strides = _strides(gpt2)
        with fastattn.accelerate(gpt2, pack=True):
            gpt2.to(torch.bfloat16)
            assert gpt2(IDS).logits.dtype is torch.bfloat16
            assert _packed(gpt2) == _all_conv1d(gpt2)
        assert _strides(gpt2) == strides
        assert gpt2.dtype is torch.bfloat16

    def test_what_was_packed_before_stays_packed(self, gpt2: Any) -> None:
        fastattn.accelerate(fastattn.pack(gpt2), pack=True).remove()
        assert _packed(gpt2) == _all_conv1d(gpt2)

    def test_saving_while_packed(self, gpt2: Any, tmp_path: Path) -> None:
        gpt2.save_pretrained(tmp_path / "plain")
        with fastattn.accelerate(gpt2, pack=True):
            gpt2.save_pretrained(tmp_path / "packed")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "packed" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
