"""gptfast generate: continue prompts."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast._options import option, values_of
from gptfast.cli._load import (
    MODEL_HELP,
    QUANTIZE_HELP,
    SPECIAL_TOKENS_HELP,
    STOP_HELP,
    TOKENIZER_HELP,
    check_batch_size,
    load,
)
from gptfast.cli._options import Change, Options, takes
from gptfast.cli._prompts import encode, read_prompts
from gptfast.cli._show import print_all, print_probabilities, stream_one
from gptfast.generation.config import TEXT_TOKENS, GenerationConfig

if TYPE_CHECKING:
    from gptfast.batch import Job
    from gptfast.models import GPT
    from gptfast.tokenizer import Tokenizer

TEMPERATURE = 0.8  # of the command line, where text is for reading: GenerationConfig's is transformers'
SEED = 0  # so that the same command prints the same text
DRAWING = ("temperature", "top_k", "top_p", "min_p")


@dataclass(frozen=True)
class Input:
    """The model and the prompts of `gptfast generate`."""

    model: str = option(MISSING, MODEL_HELP)
    prompt: list[str] | None = option(
        None,
        "Text to continue; may be given several times. Without it the prompt is read from standard input. <|endoftext|> begins "
        "a new document, where the tokenizer has that token.",
    )
    prompt_file: Path | None = option(
        None, "Read one prompt from this UTF-8 text file instead; a newline at its very end is left out."
    )
    adapter: str | None = option(None, "Folder of an adapter of the model, by GPT.save_adapter or peft.")
    tokenizer: str | None = option(None, TOKENIZER_HELP, words="the checkpoint's own")
    special_tokens: bool = option(True, SPECIAL_TOKENS_HELP)


@dataclass(frozen=True)
class Work:
    """How `gptfast generate` works, and what it shows."""

    assistant_model: str | None = option(
        None, "A smaller model with the same tokens that guesses ahead: the same text, sooner."
    )
    input: Path | None = option(
        None, 'A file with one prompt a line, as JSON: "To be", or {"prompt": "To be", "temperature": 0.5}.'
    )
    output: Path | None = option(
        None,
        "With `input`: the file of the texts, one a line. Lines that it has already are kept, whichever model wrote them.",
    )
    batch_size: int = option(16, "With `input`: how many texts are generated at a time.")
    show_probabilities: bool = option(
        False, "At each step, show the most likely next tokens (before top-k and top-p) and which was drawn."
    )
    quantize: str | None = option(
        None,
        f"{QUANTIZE_HELP}: the fewer bits the faster, and the further from the model. Without it the engine uses the weights "
        "as they are.",
    )


_GENERATION = (
    "max_new_tokens",
    *DRAWING,
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "stop_strings"),
    *(
        "overflow",
        "seed",
        "num_return_sequences",
        "num_beams",
        "length_penalty",
        "do_sample",
        "prompt_lookup_num_tokens",
    ),
)
_CHANGES = {
    "max_new_tokens": Change(words=f"{TEXT_TOKENS}, or fewer where the model has no more room"),
    "temperature": Change(default=TEMPERATURE),
    "seed": Change(default=SEED),
    "stop_strings": Change(name="stop", type=list[str], help=STOP_HELP),
    "do_sample": Change(default=False, type=bool),
}


@takes(Options(Input), Options(GenerationConfig, _GENERATION, changes=_CHANGES), Options(Work))
def generate(options: dict[str, Any]) -> None:
    """Continue a text, token by token.

    Options that are not given have the defaults of the checkpoint's generation_config.json, if it has any (see gptfast info).

    [bold]Examples[/]

      Less random than the model's own distribution:

      [cyan]gptfast generate --model runs/bard/best --prompt "ROMEO:" --temperature 0.8 --top-p 0.95[/]

      Three different continuations:

      [cyan]gptfast generate --model runs/bard/best --prompt "To be" --num-return-sequences 3[/]

      Show the most likely tokens of each step:

      [cyan]gptfast generate --model runs/bard/best --prompt "To be" --max-new-tokens 12 --show-probabilities[/]

      The most likely text of a beam search with four beams:

      [cyan]gptfast generate --model runs/bard/best --prompt "To be" --num-beams 4[/]

      With an adapter beside the model in 4 bits:

      [cyan]gptfast generate --model runs/bard/best --adapter runs/poems --quantize q4 --prompt "Shall I"[/]

      A file of prompts; the same command continues after an interruption:

      [cyan]gptfast generate --model runs/bard/best --input prompts.jsonl --output texts.jsonl[/]
    """
    inputs, work = Input(**values_of(Input, options)), Work(**values_of(Work, options))
    chosen = {"seed": SEED, **_checked(values_of(GenerationConfig, options))}
    source, output = work.input, work.output
    if (source is None) != (output is None):
        raise ValueError("generate: `input` and `output` go together; give both, or neither")
    texts = [] if source else read_prompts(inputs.prompt, inputs.prompt_file)
    adapters = {"default": inputs.adapter} if inputs.adapter else {}
    gpt, tokenizer = load(inputs.model, work.quantize, inputs.tokenizer, adapters)
    usual, drawing = defaults_of(gpt, tokenizer)
    chosen = {**usual, **chosen}
    if source is None or output is None:
        return _print_texts(gpt, tokenizer, texts, with_drawing(chosen, drawing), inputs, work)
    if inputs.prompt or inputs.prompt_file or work.assistant_model or work.show_probabilities:
        raise ValueError(
            "generate: `input` with `prompt`, `prompt_file`, `assistant_model` or `show_probabilities`; a file of prompts "
            "needs none of them - leave them out"
        )
    from gptfast.batch import read_jobs

    check_batch_size("generate", work.batch_size)
    jobs = read_jobs(source, gpt, tokenizer, chosen, drawing, inputs.special_tokens)
    _run_jobs(jobs, output, gpt, tokenizer, work.batch_size)


def with_drawing(options: dict[str, Any], drawing: Mapping[str, Any]) -> dict[str, Any]:
    """The options, with the defaults of drawing where tokens are drawn."""
    from gptfast.metadata import without_greedy

    if options.get("do_sample"):
        return {**without_greedy(drawing), **options}
    return options if options.get("num_beams", 1) > 1 else {**drawing, **options}


def _print_texts(
    gpt: GPT, tokenizer: Tokenizer, texts: list[str], options: dict[str, Any], inputs: Input, work: Work
) -> None:
    """Continue the prompts on the terminal."""
    from gptfast.batch import default_new_tokens

    ids = [encode(tokenizer, text, inputs.special_tokens) for text in texts]
    options.setdefault("max_new_tokens", default_new_tokens(gpt, max(map(len, ids)), options))
    options["tokenizer"] = tokenizer
    if work.assistant_model:
        options["assistant_model"] = load(work.assistant_model, None, inputs.tokenizer)[0]
    start = time.perf_counter()
    if work.show_probabilities:
        count = print_probabilities(gpt, tokenizer, ids, options)
    elif len(ids) == options.get("num_return_sequences", 1) == options.get("num_beams", 1) == 1:
        count = stream_one(gpt, tokenizer, texts[0], ids, options)
    else:
        count = print_all(gpt, tokenizer, ids, options)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def _run_jobs(jobs: list[Job], output: Path, gpt: GPT, tokenizer: Tokenizer, batch_size: int) -> None:
    """Continue every prompt of a file, with a progress bar on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gptfast.batch import run_jobs

    start, made, kept = time.perf_counter(), 0, None
    columns = (
        TextColumn("texts"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[speed]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("texts", total=len(jobs), speed="")

        def show(done: int, tokens: int) -> None:
            nonlocal made, kept
            made, kept = made + tokens, done if kept is None else kept
            bar.update(task, completed=done, speed=f"{made / (time.perf_counter() - start):.0f} tokens/s")

        run_jobs(jobs, output, gpt, tokenizer, batch_size, show)
    seconds = time.perf_counter() - start
    print(
        f"{len(jobs)} texts in {output}, {kept} of them from before; {made} tokens in {seconds:.1f} s, "
        f"{made / seconds:.0f} tokens/s",
        file=sys.stderr,
    )


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of drawing or of beam search; those of the other must not have been given."""
    beams, drawing = options.get("num_beams", 1), [name for name in DRAWING if name in options]
    if beams > 1 and drawing and not options.get("do_sample"):
        flags = " and ".join(f"`{name}`" for name in drawing)
        raise ValueError(
            f"generate: {flags} with `num_beams` {beams}; beam search draws nothing - leave one out, or add `do_sample`"
        )
    if beams == 1 and "length_penalty" in options:
        raise ValueError("generate: `length_penalty` ranks beams, but there is one; give `num_beams` 2 or more as well")
    return options


def defaults_of(gpt: GPT, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is not given: for every text, and for texts that are drawn."""
    from gptfast.metadata import drawing, end_option, metadata_of

    metadata = metadata_of(gpt)
    usual = metadata.defaults()
    usual.pop("max_new_tokens", None)  # as far as there is room, see `default_new_tokens`
    drawn = drawing(usual)
    usual = {name: value for name, value in usual.items() if name not in drawn}
    usual["eos_token_id"] = end_option(metadata.end_tokens(gpt.config.vocab_size, [tokenizer.eos_id]))
    return usual, {"temperature": TEMPERATURE, **drawn}
