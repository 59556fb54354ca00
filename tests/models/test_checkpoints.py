"""Folders of transformers' models, loaded and saved: logits, losses and gradients are theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

from fastattn.models import DecoderLM, ModelConfig, from_pretrained
from fastattn.models.checkpoints.families import FAMILIES
from fastattn.models.checkpoints.family import parameters
from fastattn.models.checkpoints.rope import Rope
from fastattn.testing.compare import assert_close

IDS = torch.randint(3, 61, (2, 40), generator=torch.Generator().manual_seed(7))


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


Theirs = Callable[[str], Any]
Folder = Callable[[str], Path]
Edited = Callable[..., Path]
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


def test_config_json_is_kept_while_it_holds(edited: Edited, tmp_path: Path) -> None:
    path = edited("llama, llama3", task_specific_params={"x": 1}, initializer_range=0.5)
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


def test_old_files_hold_what_is_no_parameter(folder: Folder, edited: Edited) -> None:
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
    path = edited("gpt2", mask)
    assert_same_weights(from_pretrained(path), from_pretrained(folder("gpt2")))
    path = edited("llama", {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    assert_same_weights(from_pretrained(path), from_pretrained(folder("llama")))


def test_types(folder: Folder, edited: Edited) -> None:
    def type_of(path: Path, dtype: torch.dtype | None = None) -> torch.dtype:
        (found,) = {p.dtype for p in from_pretrained(path, dtype).parameters()}
        return found

    half = {k: v.half() for k, v in load_file(folder("gpt2") / "model.safetensors").items()}
    assert type_of(edited("gpt2", half)) == torch.float16
    assert type_of(edited("gpt2", half), torch.bfloat16) == torch.bfloat16
    mixed = {**half, "transformer.wte.weight": half["transformer.wte.weight"].bfloat16()}
    assert type_of(edited("gpt2", mixed)) == torch.float32
    with pytest.raises(TypeError, match=r"dtype must be a floating type, got torch\.int32"):
        from_pretrained(folder("gpt2"), torch.int32)


def test_tied_weights_stay_one(folder: Folder, edited: Edited) -> None:
    model = DecoderLM.from_pretrained(folder("llama, grouped, tied"))
    assert model.head.weight is model.embedding.tokens.weight
    assert all(p.requires_grad and not p.is_meta for p in model.parameters())
    stored = load_file(folder("llama, grouped, tied") / "model.safetensors")
    assert "lm_head.weight" not in stored
    twice = {"lm_head.weight": stored["model.embed_tokens.weight"].clone()}
    assert_same_weights(from_pretrained(edited("llama, grouped, tied", twice)), model)
    twice["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_pretrained(edited("llama, grouped, tied", twice))


def test_last_tokens_come_from_where_generation_reads_them(edited: Edited) -> None:
    path = edited("llama")
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


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 20.0,
         "beta_slow": 3.0, "attention_factor": 1.25},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7,
         "mscale_all_dim": 0.4},
        {"rope_type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4096},
    ],
    ids=str,
)  # fmt: skip
def test_frequencies_of_large_heads_are_theirs(settings: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(
        hidden_size=1024, num_attention_heads=8, max_position_embeddings=131072,
        rope_parameters={"rope_theta": 500000.0, **settings},
    )  # fmt: skip
    compute = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[settings["rope_type"]]
    inv_freq, scale = compute(config, torch.device("cpu"))
    found = Rope().read(config.to_dict())
    ratio = torch.tensor(found["rotary_inv_freq"]).double() / inv_freq
    assert_close(ratio.float(), torch.ones(64), torch.ones(64).double())
    assert found.get("rotary_scale", 1.0) == pytest.approx(scale)


def test_keys_that_ask_for_nothing(folder: Folder, edited: Edited) -> None:
    path = edited("llama", pruned_heads={}, is_decoder=False, use_cache=True, x=None, sep_token_id=3)
    assert from_pretrained(path).config == from_pretrained(folder("llama")).config


def test_old_names_of_rope(folder: Folder, edited: Edited) -> None:
    """As transformers 4 wrote them."""
    old = {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2.0}}
    path = edited("llama, linear", rope_parameters=..., **old)
    assert from_pretrained(path).config == from_pretrained(folder("llama, linear")).config


def test_full_disk_leaves_what_was_there(edited: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited("gpt2")
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def fails(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fails)
    model = from_pretrained(path)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(path)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_who_reads_the_old_file_still_has_it(edited: Edited) -> None:
    path = edited("gpt2")
    model = from_pretrained(path, torch.bfloat16)
    before = (path / "model.safetensors").read_bytes()
    with (path / "model.safetensors").open("rb") as reader:
        model.save_pretrained(path)
        assert reader.read() == before != (path / "model.safetensors").read_bytes()


def test_save_where_a_file_is(folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        from_pretrained(folder("gpt2")).save_pretrained(tmp_path / "file")
