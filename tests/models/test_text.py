"""Text that comes token by token is the text of all tokens at once, and ends before a stop string."""

from collections.abc import Sequence
from typing import Any

import pytest

from fastattn.models.text import TextStream


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256 or not skip_special_tokens).decode(errors="replace")


class Words:
    """A tokenizer of words, with a space before each but the first, as SentencePiece decodes."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return " ".join("abcdefghij"[i] * (1 + i % 3) for i in ids)


def pieces(tokenizer: Any, ids: list[int], **options: Any) -> list[str]:
    text = TextStream(tokenizer, **options)
    out = [*(text.put(token) for token in ids), text.end()]
    assert "".join(out) == text.text
    return out


def test_characters_come_whole() -> None:
    ids = list("aé€🙂b".encode())
    assert pieces(Bytes(), ids) == ["a", "", "é", "", "", "€", "", "", "", "🙂", "b", ""]


@pytest.mark.parametrize("raw", [b"\xff", b"a\xf0\x9f", b"\xf0\x9f\x99", b"\x80\x80\x80\x80\x80\x80x", b""])
def test_broken_characters_come_too(raw: bytes) -> None:
    assert "".join(pieces(Bytes(), list(raw))) == raw.decode(errors="replace")


def test_special_tokens_have_no_text() -> None:
    assert pieces(Bytes(), [300, 97, 301, 302, 303, 304, 98, 300]) == ["", "a", "", "", "", "", "b", "", ""]


def test_words_are_joined_to_what_stands_before() -> None:
    assert pieces(Words(), [1, 2, 3]) == ["bb", " ccc", " d", ""]
    assert pieces(Words(), [1, 2, 3], context=[5]) == [" bb", " ccc", " d", ""]
    assert pieces(Words(), [1, 2], context=list(range(10)) * 9) == [" bb", " ccc", ""]


@pytest.mark.parametrize("stops", [["nd"], ["one"], ["ne a", "n"], ["e!", "d!"], ["n", "ne a"], ["and"]])
def test_text_ends_before_a_stop_string(stops: list[str]) -> None:
    text = "one and"
    shortest = min((text.split(stop)[0] for stop in stops), key=len)
    assert "".join(pieces(Bytes(), list(text.encode()), stop_strings=stops)) == shortest


def test_what_may_become_a_stop_string_waits() -> None:
    assert pieces(Bytes(), list(b"a--b-->c"), stop_strings=["-->"]) == [
        "a",
        "",
        "",
        "--b",
        "",
        "",
        "",
        "",
        "",
    ]
    assert pieces(Bytes(), list(b"a--"), stop_strings=["-->"]) == ["a", "", "", "--"]
