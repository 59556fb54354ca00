"""Text that a trained model writes."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fastattn.models import DecoderLM, Sampling
from fastattn.train.corpus import TOKENIZER
from fastattn.train.files import write_atomically
from fastattn.train.options import Options
from fastattn.train.windows import Windows

SAMPLES = "samples.md"
_PROMPTS, _PROMPT_TOKENS = 3, 24  # where no prompt is given


def write(model: DecoderLM, options: Options, folder: Path, held_back: Windows) -> str:
    """Writes the samples of a run to its folder, and returns them; "" where none are wanted."""
    room = options.context - 1
    if not options.sample_tokens or not room:
        return ""
    tokenizer: Any = Tokenizer.from_file(str(folder / TOKENIZER))
    tokenizer.encode_special_tokens = True
    if options.prompt:
        prompts = [tokenizer.encode(text).ids[-room:] or [0] for text in options.prompt]
    else:
        ids, _ = held_back.at(held_back.spread(_PROMPTS))
        prompts = ids[:, : min(_PROMPT_TOKENS, room)].tolist()
    shown = []
    for i, prompt in enumerate(prompts):
        sampling = Sampling(options.temperature, seed=options.seed + i)
        count = min(options.sample_tokens, options.context - len(prompt))
        new = model.generate([prompt], count, sampling=sampling).tokens[0]
        text = [tokenizer.decode(part, skip_special_tokens=False) for part in (prompt, new)]
        shown.append(f"Prompt:\n\n````\n{text[0]}\n````\n\nWritten:\n\n````\n{text[1]}\n````\n")
    whole = "\n---\n\n".join(shown)
    write_atomically(folder / SAMPLES, lambda path: path.write_text(whole, encoding="utf-8"))
    return whole
