"""The tokenizer that a GGUF file describes, made anew: byte-level BPE, as GPT-2, Llama 3 and Qwen2 have."""

from typing import Any

from fastattn.models.checkpoints.packages import package

_CONTROL, _USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type

_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}

# How texts are cut before merges apply, by tokenizer.ggml.pre. None: as GPT-2 does it.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, str | None] = {
    "default": None,
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _WORDS.format(digits=r"\p{N}{1,3}"),
    "llama3": _WORDS.format(digits=r"\p{N}{1,3}"),
    "qwen2": _WORDS.format(digits=r"\p{N}"),
}


def tokenizer_of(metadata: dict[str, Any]) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer`, and the texts of its special tokens by names such as "bos_token".

    Raises:
        ValueError: it is of a kind that is not understood.
    """

    def get(name: str, default: Any = None) -> Any:
        return metadata.get(f"tokenizer.ggml.{name}", default)

    kind, cut = get("model"), get("pre", "default")
    if kind != "gpt2":
        raise ValueError(f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), got {kind!r}")
    if cut not in _CUTS:
        raise ValueError(f"tokenizer.ggml.pre must be one of {', '.join(_CUTS)}, got {cut!r}")
    library = package("tokenizers")
    tokens: list[str] = get("tokens")
    merges = [tuple(merge.split(" ")) for merge in get("merges")]
    tokenizer = library.Tokenizer(
        library.models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    )
    tokenizer.pre_tokenizer = _cutting(library, cut)
    if cut == "qwen2":
        tokenizer.normalizer = library.normalizers.NFC()
    tokenizer.decoder = library.decoders.ByteLevel()
    kinds = get("token_type", [])
    for marked, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        texts = (text for text, kind in zip(tokens, kinds, strict=False) if kind == marked)
        added = [library.AddedToken(text, normalized=False, special=special) for text in texts]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    ids = {name: get(f"{theirs}_token_id") for name, theirs in _SPECIAL.items()}
    special_tokens = {name: tokens[i] for name, i in ids.items() if i is not None}
    first = [special_tokens["bos_token"]] if get("add_bos_token") else []
    last = [special_tokens["eos_token"]] if get("add_eos_token") else []
    if first or last:
        around = [(token, tokens.index(token)) for token in dict.fromkeys(first + last)]
        tokenizer.post_processor = library.processors.TemplateProcessing(
            single=[*first, "$A", *last], special_tokens=around
        )
    return tokenizer, special_tokens


def _cutting(library: Any, cut: str) -> Any:
    pre = library.pre_tokenizers
    expression = _CUTS[cut]
    if cut == "smollm":
        return pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)])
    if expression is None:
        return pre.ByteLevel(add_prefix_space=False)
    split = pre.Split(library.Regex(expression), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
