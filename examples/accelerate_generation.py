"""The usual text-generation snippet of transformers, with one line more.

python examples/accelerate_generation.py PATH_OR_ID   (default: HuggingFaceTB/SmolLM2-135M-Instruct)
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import fastattn

PROMPT = "The three most important things about attention in a Transformer are"


def main(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    handle = fastattn.accelerate(model)  # the line more
    inputs = tokenizer(PROMPT, return_tensors="pt")
    set_seed(0)
    tokens = model.generate(
        **inputs,
        max_new_tokens=40,
        do_sample=True,
        temperature=0.7,
        top_p=0.9,
        pad_token_id=tokenizer.eos_token_id,
    )
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(handle.report())


if __name__ == "__main__":
    main(*(sys.argv[1:2] or ["HuggingFaceTB/SmolLM2-135M-Instruct"]))
