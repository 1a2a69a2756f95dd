"""gptfast generate: a GPT writes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from gptfast.generation import Step
    from gptfast.models import GPT
    from gptfast.tokenizer import Tokenizer


def generate(
    model: Annotated[str, typer.Option(help="Checkpoint folder, such as runs/bard/best, or a Hugging Face hub id.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue; give it several times for several. Without any it is read from standard input."
        ),
    ] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="Read one prompt from this UTF-8 text file instead.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="How many tokens to add to each prompt, at most.")] = 200,
    temperature: Annotated[
        float, typer.Option(help="Below 1: safer and more repetitive. Above: bolder. 0: always the most likely token.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw among the k most likely tokens only; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the most likely tokens whose probabilities reach p.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text, on any machine.")] = 0,
    num_return_sequences: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    num_beams: Annotated[int, typer.Option(help="Beam search over so many beams; draws nothing.")] = 1,
    length_penalty: Annotated[
        float, typer.Option(help="With beams: above 0 favours longer text, below shorter.")
    ] = 1.0,
    show_probabilities: Annotated[
        bool,
        typer.Option("--show-probabilities", help="At each step, show the most likely next tokens and what was drawn."),
    ] = False,
) -> None:
    """Continue a text.

    [bold]Examples[/]

      gptfast generate --model runs/bard/best --prompt "ROMEO:" --temperature 0.8 --top-p 0.95

      gptfast generate --model runs/bard/best --prompt "To be" --num-return-sequences 3

      gptfast generate --model runs/bard/best --prompt "To be" --max-new-tokens 12 --show-probabilities
    """
    from gptfast.models import GPT
    from gptfast.tokenizer import load_tokenizer

    texts = _prompts(prompt, prompt_file)
    gpt = GPT.from_pretrained(model).eval()
    tokenizer = load_tokenizer(model)
    ids = [_encode(tokenizer, text) for text in texts]
    options: dict[str, Any] = {
        "max_new_tokens": _room(gpt, ids, max_new_tokens),
        "seed": seed,
        "eos_token_id": tokenizer.eos_id,
        "num_return_sequences": num_return_sequences,
    }
    if num_beams > 1:
        options |= {"num_beams": num_beams, "length_penalty": length_penalty}
    else:
        options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    start = time.perf_counter()
    if show_probabilities:
        count = _show_probabilities(gpt, tokenizer, ids, options)
    elif len(ids) == 1 and num_return_sequences == 1 and num_beams == 1:
        count = _stream(gpt, tokenizer, texts[0], ids, options)
    else:
        count = _print_all(gpt, tokenizer, ids, options)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def _prompts(prompt: list[str] | None, prompt_file: Path | None) -> list[str]:
    from gptfast._files import read_text

    if prompt and prompt_file:
        raise ValueError("generate: --prompt and --prompt-file were both given; expected one of them")
    if prompt_file:
        return [read_text(prompt_file)]
    if prompt:
        return prompt
    if sys.stdin.isatty():
        raise ValueError('generate: no prompt; give one with --prompt "…", --prompt-file, or on standard input')
    return [sys.stdin.read().rstrip("\n")]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids = tokenizer.encode(text)
    if not ids and tokenizer.eos_id is not None:
        return [tokenizer.eos_id]  # a document begins
    if not ids:
        raise ValueError(
            "generate: the prompt is empty; give at least one character - this tokenizer has no start token"
        )
    return ids


def _room(gpt: GPT, ids: list[list[int]], wanted: int) -> int:
    """How many tokens fit behind the longest prompt, said when that is less than wanted."""
    longest, limit = max(map(len, ids)), gpt.config.block_size
    room = limit - longest
    if room < 1:
        raise ValueError(
            f"generate: the prompt has {longest} tokens but block_size is {limit}; shorten it to {limit - 1} or fewer"
        )
    if room < wanted:
        print(f"(stops after {room} tokens: block_size is {limit} and the prompt has {longest})", file=sys.stderr)
    return min(room, wanted)


def _stream(gpt: GPT, tokenizer: Tokenizer, text: str, ids: list[list[int]], options: dict[str, Any]) -> int:
    """One sequence, to the terminal as it comes."""
    from gptfast.generation import stream
    from gptfast.tokenizer import StreamDecoder

    decoder, count = StreamDecoder(tokenizer), 0
    print(text, end="", flush=True)
    for step in stream(gpt, ids, **options):
        count += 1
        token = step.tokens[0]
        if token is not None and token != tokenizer.eos_id:
            print(decoder.push(token), end="", flush=True)
    print(decoder.finish())
    return count


def _print_all(gpt: GPT, tokenizer: Tokenizer, ids: list[list[int]], options: dict[str, Any]) -> int:
    copies = options["num_return_sequences"]
    rows = gpt.generate(ids, **options)
    for n, row in enumerate(rows):
        print(f"---- prompt {n // copies + 1}, continuation {n % copies + 1} " + "-" * 40)
        print(tokenizer.decode([token for token in row if token != tokenizer.eos_id]))
    return sum(map(len, rows)) - copies * sum(map(len, ids))


def _show_probabilities(gpt: GPT, tokenizer: Tokenizer, ids: list[list[int]], options: dict[str, Any]) -> int:
    """A table per step: what the model held likely, and what was drawn."""
    from rich.console import Console

    from gptfast.generation import stream

    if len(ids) > 1 or options["num_return_sequences"] > 1 or options.get("num_beams", 1) > 1:
        raise ValueError("generate: --show-probabilities shows one sequence; give one prompt and no beams or copies")
    console, count, text = Console(highlight=False), 0, list(ids[0])
    for count, step in enumerate(stream(gpt, ids, top=8, **options), start=1):
        console.print(_step_table(tokenizer, tokenizer.decode(text), step, count))
        text += [token for token in step.tokens if token is not None]
    console.print(tokenizer.decode(text), markup=False)
    return count


def _step_table(tokenizer: Tokenizer, text: str, step: Step, number: int) -> Any:
    from rich.markup import escape
    from rich.table import Table

    chosen = step.tokens[0]
    table = Table(
        "next token", "probability", "", title=escape(f"{number}: …{text[-40:]!r}"), title_justify="left", box=None
    )
    shown = step.top[0]
    for token, probability in shown:
        mark = "[green]drawn[/]" if token == chosen else ""
        bar = "█" * max(1, round(40 * probability))
        table.add_row(escape(repr(tokenizer.decode([token]))), f"{probability:6.1%} {bar}", mark)
    if chosen not in [token for token, _ in shown] and chosen is not None:
        table.add_row(escape(repr(tokenizer.decode([chosen]))), "less likely than these", "[green]drawn[/]")
    return table
