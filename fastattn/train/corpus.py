"""The documents of a run: which files, which of them are held back, and how they become tokens on disk."""

import glob
import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastattn.train.files import write_atomically
from fastattn.train.options import Options, Refusal

END = "<|endoftext|>"  # token 0, after each document
TOKENIZER = "tokenizer.json"
TRAIN, VALID = "train.bin", "valid.bin"
FACTS = "data.json"
_STDLIB_WITHOUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_CHUNK = 256  # documents that are tokenised at a time


@dataclass(frozen=True)
class Facts:
    """What `prepare` has made."""

    vocab_size: int
    train_tokens: int
    valid_tokens: int
    valid_bytes: int
    documents: int
    tokenizer_hash: str

    @property
    def bytes_per_token(self) -> float:
        """Of what is held back."""
        return self.valid_bytes / self.valid_tokens

    @property
    def token_type(self) -> str:
        """Of the numbers on disk."""
        return "<u2" if self.vocab_size <= 1 << 16 else "<u4"


# ---- files ----


def find(sources: Sequence[str]) -> list[Path]:
    """The files that --data names, in a fixed order, each once."""
    found: dict[Path, None] = {}
    for source in sources:
        paths = list(_files(source))
        if not paths:
            raise Refusal(f"--data: there is no file, folder with files, or match for {source!r}")
        found |= dict.fromkeys(paths)
    return list(found)


def _files(source: str) -> Iterator[Path]:
    path = Path(source).expanduser()
    if source == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        found = sorted(root.rglob("*.py"))
        yield from (p for p in found if _STDLIB_WITHOUT.isdisjoint(p.relative_to(root).parts))
    elif path.is_dir():
        inside = (p for p in sorted(path.rglob("*")) if p.is_file())
        yield from (p for p in inside if not any(x[0] == "." for x in p.relative_to(path).parts))
    elif path.exists():
        yield path
    else:
        yield from (Path(p) for p in sorted(glob.glob(str(path), recursive=True)) if Path(p).is_file())


def _read(path: Path, as_text: bool) -> bytes:
    try:
        content = path.read_bytes()
        if as_text:
            content.decode()
    except OSError as error:
        raise Refusal(f"--data: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise Refusal(
            f"--data: {path} is not UTF-8 text ({error}). A glob such as 'folder/**/*.txt' picks files, and "
            "--tokenizer bytes takes any"
        ) from None
    return content


def split(documents: Sequence[bytes], share: float, seed: int) -> tuple[list[bytes], list[bytes]]:
    """(to train on, held back): whole documents, chosen by their content; of a single one its end.

    A copy of a document goes where the document goes, and the order of files decides nothing.
    """
    documents = [x for x in documents if x]
    if len(documents) == 1:
        cut = max(1, int(len(documents[0]) * (1.0 - share)))
        while cut < len(documents[0]) and documents[0][cut] & 0xC0 == 0x80:
            cut += 1  # not within a character of UTF-8
        return [documents[0][:cut]], [documents[0][cut:]]
    keys = [hashlib.sha256(b"%d:" % seed + x).digest() for x in documents]
    wanted, held_back = share * sum(map(len, documents)), set[bytes]()
    sizes = dict(zip(keys, map(len, documents), strict=True))
    for key in sorted(sizes)[:-1]:
        if wanted <= 0:
            break
        held_back.add(key)
        wanted -= sizes[key]
    pairs = list(zip(keys, documents, strict=True))
    return [x for key, x in pairs if key not in held_back], [x for key, x in pairs if key in held_back]


# ---- tokens ----


def make_tokenizer(kind: str, vocab_size: int, documents: Sequence[bytes]) -> Any:
    """Of bytes, with merges learned from documents or without any. Token 0 ends a document."""
    letters = _byte_letters()
    vocabulary = {END: 0} | {letter: 1 + byte for byte, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if kind == "bpe":
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[END], initial_alphabet=letters, show_progress=False
        )
        tokenizer.train_from_iterator((x.decode() for x in documents), trainer)
    else:
        tokenizer.add_special_tokens([END])
    return tokenizer


def _byte_letters() -> list[str]:
    """The printable letter that stands for each byte in byte-level BPE, as GPT-2 has it."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]


def encode(tokenizer: Any, kind: str, documents: Sequence[bytes]) -> Iterator[Any]:
    """The tokens of each document and the END after it, as arrays."""
    tokenizer.encode_special_tokens = True  # a document may hold the very text of END
    for first in range(0, len(documents), _CHUNK):
        chunk = documents[first : first + _CHUNK]
        if kind == "bytes":
            tokens = [np.frombuffer(x, np.uint8).astype(np.uint32) + 1 for x in chunk]
        else:
            tokens = [np.array(x.ids, np.uint32) for x in tokenizer.encode_batch([x.decode() for x in chunk])]
        yield from (np.append(x, np.uint32(0)) for x in tokens)


def prepare(options: Options, folder: Path) -> Facts:
    """Makes the tokens of a run in its folder, unless they are there already.

    Raises:
        Refusal: a file cannot be read, or there is too little text for one window.
    """
    if (folder / FACTS).exists():
        return load(folder)
    documents = [_read(path, options.tokenizer == "bpe") for path in find(options.data)]
    if not any(documents):
        raise Refusal(f"--data: the {len(documents)} files are empty")
    parts = dict(zip((TRAIN, VALID), split(documents, options.valid_share, options.seed), strict=True))
    tokenizer = make_tokenizer(options.tokenizer, options.vocab_size, parts[TRAIN])
    size = tokenizer.get_vocab_size()
    tokens = {
        name: np.concatenate([np.zeros(0, np.uint32), *encode(tokenizer, options.tokenizer, part)])
        for name, part in parts.items()
    }
    for name, what in ((TRAIN, "to train on"), (VALID, "held back for evaluation (--valid-share)")):
        if len(tokens[name]) <= options.context:
            raise Refusal(
                f"--data: {len(tokens[name])} tokens are {what}, and one window takes --context + 1 = "
                f"{options.context + 1}"
            )
    text = tokenizer.to_str()
    facts = Facts(
        size, len(tokens[TRAIN]), len(tokens[VALID]), sum(map(len, parts[VALID])),
        sum(map(len, parts.values())), hash_of(text),
    )  # fmt: skip
    write_atomically(folder / TOKENIZER, lambda path: path.write_text(text, encoding="utf-8"))
    for name in parts:
        write_atomically(folder / name, tokens[name].astype(facts.token_type).tofile)
    # The last one: with it, all are there.
    write_atomically(folder / FACTS, lambda path: path.write_text(json.dumps(asdict(facts), indent=2) + "\n"))
    return facts


def hash_of(text: str) -> str:
    """Of a tokenizer's file."""
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path) -> Facts:
    """What `prepare` has left in a folder. Raises Refusal where it was changed since."""
    try:
        facts = Facts(**json.loads((folder / FACTS).read_text()))
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
        sizes = {name: (folder / name).stat().st_size for name in (TRAIN, VALID)}
    except (OSError, ValueError, TypeError) as error:
        raise Refusal(f"{folder} does not hold a run's tokens: {error}") from error
    if hash_of(text) != facts.tokenizer_hash:
        raise Refusal(f"{folder / TOKENIZER} is not the tokenizer that this run began with")
    width = np.dtype(facts.token_type).itemsize
    for name, tokens in ((TRAIN, facts.train_tokens), (VALID, facts.valid_tokens)):
        if sizes[name] != tokens * width:
            raise Refusal(f"{folder / name} should have {tokens * width} bytes, it has {sizes[name]}")
    return facts
