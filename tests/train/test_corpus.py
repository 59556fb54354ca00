"""Which files a run reads, what it holds back, and how text becomes tokens."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fastattn.train import corpus
from fastattn.train.options import Options, Refusal
from fastattn.train.windows import Windows, dropout_seed


def test_files_folders_and_globs_are_found_once_and_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/c.py", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    names = [p.relative_to(tmp_path).as_posix() for p in corpus.find([str(tmp_path)])]
    assert names == ["a.txt", "b.txt", "deep/c.py"]
    found = corpus.find([str(tmp_path / "b.txt"), f"{tmp_path}/**/*.py", str(tmp_path)])
    assert [p.name for p in found] == ["b.txt", "c.py", "a.txt"]
    with pytest.raises(Refusal, match=r"--data: there is no file.*'nothing\.txt'"):
        corpus.find(["nothing.txt"])


def test_the_standard_library_is_its_sources_without_tests() -> None:
    found = corpus.find(["stdlib"])
    names = {p.name for p in found}
    assert len(found) > 300
    assert {"argparse.py", "dataclasses.py"} <= names
    assert not [p for p in found if "site-packages" in p.parts or p.name.startswith("test_")][:3]
    assert found == sorted(found)


def test_the_split_is_by_content() -> None:
    documents = [bytes([65 + i]) * (10 + i) for i in range(20)]
    kept, held = corpus.split(documents, 0.2, seed=1)
    assert sorted(kept + held) == sorted(documents)
    assert 0 < sum(map(len, held)) <= 0.2 * sum(map(len, documents)) + 30
    # Another order, a copy and an empty file change nothing of who is held back.
    again = corpus.split([*documents[::-1], held[0], b""], 0.2, seed=1)
    assert set(again[1]) <= set(held)
    assert held[0] not in again[0]
    assert set(corpus.split(documents, 0.2, seed=2)[1]) != set(held)


def test_of_a_single_document_the_end_is_held_back() -> None:
    text = "größer, " * 50
    kept, held = corpus.split([text.encode()], 0.31, seed=0)
    assert kept[0].decode() + held[0].decode() == text


def test_all_copies_of_one_document_are_trained_on() -> None:
    kept, held = corpus.split([b"same"] * 3, 0.3, seed=0)
    assert (len(kept), held) == (3, [])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_tokens_are_the_text_again(kind: str, tmp_path: Path) -> None:
    text = f"def größer(x):\n\treturn '{corpus.END}'\n" * 30
    tokenizer = corpus.make_tokenizer(kind, 300, [text.encode()])
    ids, end = np.split(next(corpus.encode(tokenizer, kind, [text.encode()])), [-1])
    assert end == 0
    assert 0 not in ids  # the text of END within a document is text
    assert ids.max() < tokenizer.get_vocab_size() <= 300
    # What is saved reads the same.
    tokenizer.save(str(tmp_path / "t.json"))
    saved: Any = Tokenizer.from_file(str(tmp_path / "t.json"))
    saved.encode_special_tokens = True
    assert saved.encode(text).ids == ids.tolist()
    assert saved.decode(ids.tolist()) == text
    assert saved.token_to_id(corpus.END) == 0


def test_bytes_take_what_is_no_text() -> None:
    data = bytes(range(256))
    tokenizer = corpus.make_tokenizer("bytes", 0, [data])
    assert next(corpus.encode(tokenizer, "bytes", [data])).tolist() == [*range(1, 257), 0]
    assert tokenizer.get_vocab_size() == 257


def test_bpe_learns_the_same_twice(texts: Path) -> None:
    documents = [p.read_bytes() for p in sorted(texts.iterdir())]
    first, second = (corpus.make_tokenizer("bpe", 400, documents).to_str() for _ in range(2))
    assert first == second


def test_what_is_prepared_is_read_back_or_refused(texts: Path, tmp_path: Path) -> None:
    options = Options(data=(str(texts),), tokenizer="bpe", vocab_size=300, context=16)
    facts = corpus.prepare(options, tmp_path)
    assert corpus.prepare(options, tmp_path) == corpus.load(tmp_path) == facts
    assert facts.documents == 6
    assert facts.bytes_per_token > 1.0
    (tmp_path / corpus.TRAIN).write_bytes(b"short")
    with pytest.raises(Refusal, match=r"train\.bin should have \d+ bytes, it has 5"):
        corpus.load(tmp_path)
    (tmp_path / corpus.TOKENIZER).write_text("{}")
    with pytest.raises(Refusal, match=r"tokenizer\.json is not the tokenizer"):
        corpus.load(tmp_path)


@pytest.mark.parametrize("token_type", ["<u2", "<u4"])
def test_windows_are_a_rule_of_seed_and_step(token_type: str, tmp_path: Path) -> None:
    np.arange(50, dtype=token_type).tofile(tmp_path / "x.bin")
    data = Windows(tmp_path / "x.bin", token_type, 8)
    starts = data.random(seed=3, step=5, count=200)
    assert data.random(3, 5, 7) == starts[:7]
    assert starts != data.random(3, 6, 200)
    assert starts != data.random(4, 5, 200)
    assert (min(starts), max(starts)) == (0, 41)  # the last one ends with the last token
    ids, targets = data.at([0, 41])
    assert ids.tolist()[1] == [*range(41, 49)]
    assert targets.tolist()[1] == [*range(42, 50)]
    assert data.spread() == data.spread(99) == [0, 8, 16, 24, 32, 40]
    assert data.spread(2) == [0, 24]
    seeds = {dropout_seed(3, step, window) for step in range(3) for window in range(3)}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_windows_stay_what_they_were(tmp_path: Path) -> None:
    """A run of an older version goes on with the same data."""
    np.arange(1000, dtype="<u2").tofile(tmp_path / "x.bin")
    assert Windows(tmp_path / "x.bin", "<u2", 8).random(0, 1, 4) == [454, 872, 400, 681]
