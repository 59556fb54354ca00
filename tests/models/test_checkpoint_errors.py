"""Checkpoints that are cut off, incomplete or of something else: the error names the file and the tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.models import from_pretrained
from fastattn.models.pretrained import Pretrained

Theirs = Callable[[str], Any]
Folder = Callable[[str], Path]
Edited = Callable[..., Path]

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
def test_tensors_that_do_not_fit(edited: Edited, tensors: Any, message: str) -> None:
    path = edited("llama", tensors)
    with pytest.raises(ValueError, match=rf"{path} does not fit its config: .*{message}"):
        from_pretrained(path)


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
def test_file_that_is_cut_off(edited: Edited, keep: int, message: str) -> None:
    file = edited("llama") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"{file} is not a whole safetensors file: .*{message}"):
        from_pretrained(file.parent)


def test_file_that_is_something_else(edited: Edited) -> None:
    file = edited("llama") / "model.safetensors"
    file.write_bytes(b"\x10" + bytes(7) + b"this is not JSON" + bytes(100))
    with pytest.raises(ValueError, match=rf"{file} is not a whole safetensors file"):
        from_pretrained(file.parent)


def test_shards_that_are_wrong(theirs: Theirs, tmp_path: Path) -> None:
    theirs("llama").save_pretrained(tmp_path, max_shard_size="12KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]

    def write(places: Any) -> None:
        index.write_text(json.dumps({"weight_map": places}))

    write({**places, "model.x": places[Q]})
    with pytest.raises(ValueError, match=rf"{places[Q]} has no model\.x, which model\.safetensors\.index"):
        from_pretrained(tmp_path)
    write({**places, Q: "../model.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"lists \.\./model\.safetensors, which is not in"):
        from_pretrained(tmp_path)
    write(places)
    (tmp_path / places[Q]).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{index} lists {places[Q]}, which is not in"):
        from_pretrained(tmp_path)
    write(["x"])
    with pytest.raises(ValueError, match=rf"{index} has no weight_map"):
        from_pretrained(tmp_path)


def test_what_is_not_there(edited: Edited, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere.*snapshot_download"):
        from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"there is no file {tmp_path / 'config.json'}"):
        from_pretrained(tmp_path)
    path = edited("llama")
    (path / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index"
    ):
        from_pretrained(path)
    (path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"pytorch_model\.bin is a pickle"):
        from_pretrained(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{path / 'config.json'} is not JSON"):
        from_pretrained(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold an object, got list"):
        from_pretrained(path)


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
        ("llama", {"pruned_heads": {"1": [0]}, "x": 0}, r"pruned_heads = .*, x = 0: not understood"),
        ("llama", {"is_decoder": True}, "is_decoder = True: not understood"),
        ("llama", {"rope_interleaved": True}, "rope_interleaved must be false, got True"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        ("llama", {"rope_parameters": 3}, "rope_parameters must be an object, got 3"),
        ("llama", {"rope_scaling": {"type": "dynamic"}}, "type must be one of default, .*, got 'dynamic'"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear must have factor"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "not understood: x"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor must be a number, got '2'"),
        ("llama", {"num_attention_heads": 0}, "num_heads must be at least 1, got 0"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window must be False, got True"),
        ("qwen2", {"layer_types": ["sliding_attention"]}, "layer_types must be full_attention for every"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ("gpt2", {"resid_pdrop": 0.2}, r"resid_pdrop and embd_pdrop must be the same, got 0\.2 and 0\.1"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention must be False, got True"),
    ],
)  # fmt: skip
def test_configs_that_ask_for_something_else(
    edited: Edited, name: str, keys: dict[str, Any], message: str
) -> None:
    path = edited(name, **keys)
    with pytest.raises(ValueError, match=rf"{path / 'config.json'}: .*{message}"):
        from_pretrained(path)


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
