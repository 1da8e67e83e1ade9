"""Chat on a small model, last part: answers of the checkpoint, and the same text by transformers from the export.

python scripts/chat_small/compare.py --checkpoint RUN --export FOLDER [--tokens 40]

Fails if transformers writes other text than Tinytron, with the likeliest token at every step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from dialogues import Function, chosen, question

from tinytron.cli import entry
from tinytron.errors import CheckpointError
from tinytron.inference import SamplingOptions, complete
from tinytron.interop.open import open_model
from tinytron.text.dialogue import dialogue_of_run
from tinytron.text.run_tokenizer import tokenizer_of_run

QUESTIONS = 6


def main() -> None:
    """Ask the questions and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run of the fine-tuned model")
    parser.add_argument("--export", type=Path, required=True, help="its export")
    parser.add_argument("--tokens", type=int, default=40, help="longest answer")
    args = parser.parse_args()
    model, config = open_model(args.checkpoint)
    tokenizer = tokenizer_of_run(config, None, args.checkpoint)
    dialogue = dialogue_of_run(config, tokenizer, "chatml")
    asked: list[Function] = chosen(300)[:QUESTIONS]
    prompts = [dialogue.prompt_ids([question(number, function)]) for number, function in enumerate(asked)]
    stop_tokens, stop = dialogue.end
    text = tokenizer.tokenizer
    options = SamplingOptions(max_new_tokens=args.tokens, temperature=0.0, stop_tokens=stop_tokens, stop=stop)
    made = complete(model, prompts, options, decode=text.decode, vocab_size=text.vocab_size)
    theirs = by_transformers(args.export, prompts, args.tokens)
    right = 0
    for number, (function, sample) in enumerate(zip(asked, made.samples, strict=True)):
        print(f"> {question(number, function)['content']}\n{sample.text.strip()}\n")
        right += sample.text.strip() == function.sentence
        expected = theirs[number][: len(sample.tokens)]
        if expected != sample.tokens:
            raise CheckpointError(
                f"transformers continues with {text.decode(expected)!r}, Tinytron with {text.decode(sample.tokens)!r}"
            )
    print(f"{right} of {len(asked)} answers are the docstring's; transformers writes the same text")


def by_transformers(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The likeliest continuations of ``prompts``, one by one."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        found.append(made[0, len(prompt) :].tolist())
    return found


if __name__ == "__main__":
    entry.run(main)
