"""From text to token ids and back, with what a folder or a GGUF file says of it."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from fastattn.models.checkpoints.folder import read_json
from fastattn.models.checkpoints.gguf_file import open_gguf
from fastattn.models.checkpoints.gguf_tokenizer import tokenizer_of
from fastattn.models.checkpoints.packages import package

_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A `tokenizers.Tokenizer` and the template of a conversation.

    Args:
        backend: a `tokenizers.Tokenizer`; its truncation and padding are switched off.
        chat_template: Jinja text, or None.
        special: texts of special tokens, by names such as "bos_token", as templates use them.
    """

    def __init__(
        self, backend: Any, chat_template: str | None = None, special: dict[str, str] | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.chat_template = chat_template
        self.special = special or {}

    def __len__(self) -> int:
        """How many tokens there are."""
        return int(self.backend.get_vocab_size())

    def __repr__(self) -> str:
        return f"Tokenizer({len(self)} tokens, {'a' if self.chat_template else 'no'} chat template)"

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The ids of a text.

        Args:
            special: with what the tokenizer puts around a text, such as a first token. Special tokens that
                are spelled out in the text are found in any case.
        """
        ids: list[int] = self.backend.encode(text, add_special_tokens=special).ids
        return ids

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of ids, with or without special tokens."""
        text: str = self.backend.decode(list(ids), skip_special_tokens=not special)
        return text

    def id_of(self, token: str) -> int | None:
        """The id of a whole token, or None."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def save_pretrained(self, path: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json into a folder, as transformers reads them."""
        path = Path(path).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        self.backend.save(str(path / "tokenizer.json"))
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (path / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def chat(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; `encode(text, special=False)` makes it what the model was trained on.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: with the beginning of the answer.
        Raises:
            ValueError: there is no template, or it does not take these messages.
        """
        if self.chat_template is None:
            raise ValueError("this tokenizer has no chat template")
        jinja2 = package("jinja2")
        environment = package("jinja2.sandbox").ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        # What templates of the Hugging Face Hub expect to be there.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            text: str = environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.special
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not take these messages: {error}") from error
        return text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a folder (tokenizer.json, tokenizer_config.json, chat_template.jinja) or a .gguf file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not understood; names the file.
        ImportError: a package is missing; says how to get it.
    """
    path = Path(path).expanduser()
    if path.suffix == ".gguf":
        metadata = open_gguf(path).metadata
        try:
            backend, special = tokenizer_of(metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        return Tokenizer(backend, metadata.get("tokenizer.chat_template"), special)
    file = path / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no file {file}. transformers' AutoTokenizer.from_pretrained({str(path)!r})"
            f".save_pretrained({str(path)!r}) writes it for models that come without"
        )
    try:
        backend = package("tokenizers").Tokenizer.from_file(str(file))
    except Exception as error:  # it raises nothing narrower
        raise ValueError(f"{file} is no tokenizer: {error}") from error
    config_file = path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.exists() else {}
    special = {name: _text(config[name]) for name in _SPECIAL if config.get(name) is not None}
    return Tokenizer(backend, _template(path, config), special)


def _template(path: Path, config: dict[str, Any]) -> str | None:
    """A file of its own, or the text in tokenizer_config.json; of several there, the default."""
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    if isinstance(found, list):
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


def _text(token: Any) -> str:
    """A token is its text, or an object with more about it."""
    return str(token["content"] if isinstance(token, dict) else token)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Jinja's own escapes what HTML does not like."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> None:
    raise package("jinja2").TemplateError(message)
