"""Folders of transformers' models, loaded and saved: logits, losses and gradients are theirs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastattn.models import DecoderLM, ModelConfig, from_pretrained
from fastattn.models.checkpoints.families import FAMILIES
from fastattn.models.checkpoints.family import parameters
from fastattn.models.pretrained import Pretrained
from fastattn.testing.compare import assert_close

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(7))

Theirs = Callable[[str], Any]
Folder = Callable[[str], Path]
PLAIN = ["gpt2", "llama, grouped, tied", "qwen2", "mistral, window"]


def reloaded(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' own, whose rotary frequencies stay in float32 if it is loaded in another type."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_theirs(folder: Folder, decoder: str, dtype: torch.dtype) -> None:
    base, truth = (reloaded(folder(decoder), dtype) for _ in range(2))
    ours = DecoderLM.from_pretrained(folder(decoder), dtype)
    assert not ours.training
    assert {p.dtype for p in ours.parameters()} == {dtype}
    with torch.no_grad():
        assert_close(ours(IDS), base(IDS).logits, truth.double()(IDS).logits, decoder)


@pytest.mark.parametrize("name", PLAIN)
def test_loss_and_gradients_are_theirs(folder: Folder, name: str) -> None:
    ours = DecoderLM.from_pretrained(folder(name))
    family = next(family for family in FAMILIES if family.model_type == ours.source["model_type"])
    base, truth = reloaded(folder(name)), reloaded(folder(name)).double()
    targets = F.pad(IDS[:, 1:], (0, 1), value=-100)

    def run(model: Any) -> Tensor:
        loss = F.cross_entropy(model(IDS).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.detach()

    loss = ours.loss(IDS, targets)
    loss.backward()
    assert_close(loss.detach(), run(base), run(truth), "loss")
    gradients = [dict(model.named_parameters()) for model in (base, truth)]
    seen = set()
    for ours_name, parameter in parameters(ours)[0].items():
        for piece in family.pieces(ours_name, parameter, ours.config):
            gradient = piece.order.write(parameter.grad[piece.rows], ours.config)
            assert_close(gradient, *(x[piece.name].grad for x in gradients), piece.name)
            seen.add(piece.name)
    assert seen == set(gradients[0])


def test_they_load_what_we_save(theirs: Theirs, folder: Folder, decoder: str, tmp_path: Path) -> None:
    ours = from_pretrained(folder(decoder))
    ours.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert again.config == ours.config
    assert_same_weights(again, ours)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(theirs(decoder))
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, theirs(decoder)(IDS).logits)


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "name", ["gpt2, untied, inner", "llama, biases, one key head", "qwen2", "mistral, window"]
)
def test_a_model_of_ours_finds_its_family(theirs: Theirs, folder: Folder, name: str, tmp_path: Path) -> None:
    ours = from_pretrained(folder(name), torch.bfloat16)
    ours.source = None  # as if it had never been loaded
    ours.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is type(theirs(name)) and back.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, reloaded(folder(name), torch.bfloat16)(IDS).logits)


@pytest.mark.parametrize(
    "choices",
    [
        {"positions": "alibi", "gated": False, "activation": "relu2", "head_bias": True},
        {"positions": "sinusoidal", "pre_norm": False, "embed_scale": 3.0},
        {"rotary_dim": 4, "softcap": 5.0, "window": 3, "eos_ids": (3, 4)},
        {"rotary_inv_freq": (1.0, 0.5, 0.25, 0.125), "rotary_scale": 1.5},
    ],
    ids=str,
)
def test_what_they_have_no_model_for_is_saved_as_ours(choices: dict[str, Any], tmp_path: Path) -> None:
    config = ModelConfig(**{**SMALL, **choices})
    model = DecoderLM(config).eval()
    model.save_pretrained(tmp_path)
    again = DecoderLM.from_pretrained(tmp_path)
    assert again.config == config
    assert read(tmp_path / "config.json")["model_type"] == "fastattn.DecoderLM"
    assert torch.equal(again(IDS), model(IDS))


SMALL: dict[str, Any] = {
    "vocab_size": 61, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 48, "max_positions": 64,
}  # fmt: skip


def test_dropout_does_not_keep_a_model_from_its_family(tmp_path: Path) -> None:
    config = ModelConfig(**SMALL, dropout=0.25, attention_dropout=0.125)
    DecoderLM(config).save_pretrained(tmp_path)
    assert read(tmp_path / "config.json")["model_type"] == "llama"
    assert from_pretrained(tmp_path).config == config


def test_config_json_is_kept_while_it_holds(folder: Folder, tmp_path: Path) -> None:
    path = copied(folder("llama, llama3"), tmp_path / "a")
    change(path / "config.json", task_specific_params={"x": 1}, initializer_range=0.5)
    model = DecoderLM.from_pretrained(path)
    model.save_pretrained(tmp_path / "b")
    before, after = read(path / "config.json"), read(tmp_path / "b" / "config.json")
    assert after == before
    model.config = ModelConfig(**SMALL, tie_embeddings=False, norm_eps=1e-3)
    model.save_pretrained(tmp_path / "c")
    assert read(tmp_path / "c" / "config.json")["rms_norm_eps"] == 1e-3


def test_sharded_folder(theirs: Theirs, folder: Folder, tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_weights(from_pretrained(tmp_path), from_pretrained(folder("llama")))


@pytest.mark.parametrize("name", ["gpt2", "llama, grouped, tied"])
def test_folder_of_a_model_without_its_head(
    theirs: Theirs, folder: Folder, name: str, tmp_path: Path
) -> None:
    theirs(name).base_model.save_pretrained(tmp_path)
    assert_same_weights(from_pretrained(tmp_path), from_pretrained(folder(name)))


def test_old_files_hold_what_is_no_parameter(folder: Folder, tmp_path: Path) -> None:
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    path = rewrite(folder("gpt2"), tmp_path, mask)
    assert_same_weights(from_pretrained(path), from_pretrained(folder("gpt2")))
    path = rewrite(folder("llama"), tmp_path, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same_weights(from_pretrained(path), from_pretrained(folder("llama")))


def test_types(folder: Folder, tmp_path: Path) -> None:
    def type_of(path: Path, dtype: torch.dtype | None = None) -> torch.dtype:
        (found,) = {p.dtype for p in from_pretrained(path, dtype).parameters()}
        return found

    half = {k: v.half() for k, v in load_file(folder("gpt2") / "model.safetensors").items()}
    assert type_of(rewrite(folder("gpt2"), tmp_path, half)) == torch.float16
    assert type_of(tmp_path, torch.bfloat16) == torch.bfloat16
    mixed = {**half, "transformer.wte.weight": half["transformer.wte.weight"].bfloat16()}
    assert type_of(rewrite(folder("gpt2"), tmp_path, mixed)) == torch.float32
    with pytest.raises(TypeError, match=r"dtype must be a floating type, got torch\.int32"):
        from_pretrained(folder("gpt2"), torch.int32)


def test_tied_weights_stay_one(folder: Folder, tmp_path: Path) -> None:
    model = DecoderLM.from_pretrained(folder("llama, grouped, tied"))
    assert model.head.weight is model.embedding.tokens.weight
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    stored = load_file(folder("llama, grouped, tied") / "model.safetensors")
    assert "lm_head.weight" not in stored
    twice = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    assert_same_weights(from_pretrained(rewrite(folder("llama, grouped, tied"), tmp_path, twice)), model)
    twice["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_pretrained(rewrite(folder("llama, grouped, tied"), tmp_path, twice))


def test_last_tokens_come_from_where_generation_reads_them(folder: Folder, tmp_path: Path) -> None:
    path = copied(folder("llama"), tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert from_pretrained(path).config.eos_ids == (5, 6)
    (path / "generation_config.json").unlink()
    assert from_pretrained(path).config.eos_ids == (2,)


def test_the_model_is_in_memory_once(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says how much memory a process has held at most")
    model = DecoderLM(ModelConfig(**{**SMALL, "num_layers": 12, "embed_dim": 256, "hidden_dim": 2048}))
    model.save_pretrained(tmp_path)
    size = sum(p.nbytes for p in model.parameters())
    done = run_python(f"""
        import re
        from pathlib import Path
        import safetensors.torch
        from fastattn.models import from_pretrained

        def held(kind):
            status = Path("/proc/self/status").read_text()
            return int(re.search(kind + r":\\s+(\\d+)", status)[1]) * 1024

        before = held("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        model = from_pretrained({str(tmp_path)!r})
        print(held("VmHWM") - before)
    """)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1.4 * size


# ---- what is wrong is told ----


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    return to


def change(file: Path, **keys: Any) -> None:
    """Sets keys of a JSON file; ... takes one out."""
    changed = {**read(file), **keys}
    file.write_text(json.dumps({key: value for key, value in changed.items() if value is not ...}))


def rewrite(folder: Path, to: Path, tensors: dict[str, Any]) -> Path:
    """A copy with other tensors; None takes one out."""
    copied(folder, to)
    changed = {**load_file(folder / "model.safetensors"), **tensors}
    kept = {name: x.contiguous() for name, x in changed.items() if x is not None}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to


Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({Q: None}, rf"{Q} is missing"),
        ({Q: torch.zeros(32, 31)}, rf"model\.safetensors: {Q} must be \[32, 32\], got \[32, 31\]"),
        ({Q: torch.zeros(32, 32, dtype=torch.int8)}, rf"{Q} must be of a floating type, got I8"),
        ({"model.layers.2.mlp.x": torch.zeros(1)}, r"model\.layers\.2\.mlp\.x was not expected"),
        ({Q.replace("weight", "bias"): torch.zeros(32)}, r"q_proj\.bias was not expected"),
        ({f"model.{i}": torch.zeros(1) for i in range(9)}, r"was not expected and 4 more$"),
    ],
)
def test_tensors_that_do_not_fit(folder: Folder, tmp_path: Path, tensors: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        from_pretrained(rewrite(folder("llama"), tmp_path, tensors))
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (-1, r"breaks off in "),
        (3000, r"it has \d+ of \d+ bytes and breaks off in (lm_head|model\.)"),
        (100, "breaks off before the list of its tensors ends"),
        (4, "breaks off before the list"),
        (0, "breaks off before the list"),
    ],
)
def test_file_that_is_cut_off(folder: Folder, tmp_path: Path, keep: int, message: str) -> None:
    file = copied(folder("llama"), tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{file} is not a whole safetensors file: .*{message}"):
        from_pretrained(tmp_path)


def test_file_that_is_something_else(folder: Folder, tmp_path: Path) -> None:
    file = copied(folder("llama"), tmp_path) / "model.safetensors"
    file.write_bytes(b"\x10" + bytes(7) + b"this is not JSON" + bytes(100))
    with pytest.raises(ValueError, match=rf"{file} is not a whole safetensors file"):
        from_pretrained(tmp_path)


def test_shards_that_are_wrong(theirs: Theirs, tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    index = tmp_path / "model.safetensors.index.json"
    places = read(index)["weight_map"]
    change(index, weight_map={**places, "model.x": places[Q]})
    with pytest.raises(ValueError, match=rf"{places[Q]} has no model\.x, which model\.safetensors\.index"):
        from_pretrained(tmp_path)
    change(index, weight_map={**places, Q: "../model.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"lists \.\./model\.safetensors, which is not in"):
        from_pretrained(tmp_path)
    change(index, weight_map=places)
    (tmp_path / places[Q]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{index} lists {places[Q]}, which is not in"):
        from_pretrained(tmp_path)
    change(index, weight_map=["x"])
    with pytest.raises(ValueError, match=rf"{index} has no weight_map"):
        from_pretrained(tmp_path)


def test_what_is_not_there(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere.*snapshot_download"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"there is no file {tmp_path / 'config.json'}"):
        from_pretrained(tmp_path)
    copied(folder("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index"
    ):
        from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{tmp_path / 'config.json'} is not JSON"):
        from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("llama", {"model_type": "mamba"}, r"model_type must be one of gpt2, llama, .*, got 'mamba'"),
        ("llama", {"model_type": ...}, r"model_type must be one of .*, got None"),
        ("llama", {"hidden_size": ...}, "hidden_size is missing"),
        ("llama", {"hidden_size": "32"}, "hidden_size must be of type int, got '32'"),
        ("llama", {"hidden_size": True}, "hidden_size must be of type int, got True"),
        ("llama", {"hidden_act": "mish"}, r"hidden_act must be one of gelu, .*, got 'mish'"),
        ("llama", {"num_key_value_heads": 3}, "num_kv_heads must divide num_heads=4, got 3"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config = .*: not understood"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved must be false, got True"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        ("llama", {"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "type must be one of default, .*, got 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear must have factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "not understood: x"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types must be full_attention for every"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ("gpt2", {"resid_pdrop": 0.2}, r"resid_pdrop and embd_pdrop must be the same, got 0\.2 and 0\.1"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False, got True"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_something_else(
    folder: Folder, tmp_path: Path, name: str, keys: dict[str, Any], message: str
) -> None:
    file = copied(folder(name), tmp_path) / "config.json"
    change(file, **keys)
    with pytest.raises(ValueError, match=rf"{file}: .*{message}"):
        from_pretrained(tmp_path)


def test_old_names_of_rope(theirs: Theirs, folder: Folder, tmp_path: Path) -> None:
    """As transformers 4 wrote them."""
    change(
        copied(folder("llama, linear"), tmp_path) / "config.json",
        rope_parameters=..., rope_theta=10000, rope_scaling={"type": "linear", "factor": 2.0},
    )  # fmt: skip
    assert from_pretrained(tmp_path).config == from_pretrained(folder("llama, linear")).config


def test_another_class(folder: Folder) -> None:
    class Other(Pretrained):
        pass

    with pytest.raises(TypeError, match=r"config\.json is a gpt2: a DecoderLM, not a Other"):
        Other.from_pretrained(folder("gpt2"))


def test_missing_package(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(
        ImportError, match=r"this needs safetensors; get it with: pip install 'fastattn\[models\]'"
    ):
        from_pretrained(folder("gpt2"))


def test_full_disk_leaves_what_was_there(
    folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copied(folder("gpt2"), tmp_path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def fails(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    model = from_pretrained(path)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_save_where_a_file_is(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        from_pretrained(folder("gpt2")).save_pretrained(tmp_path / "file")
