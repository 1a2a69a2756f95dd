"""The output of `gptfast generate` on the terminal."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.generation import Step
    from gptfast.models import GPT
    from gptfast.tokenizer import Tokenizer

TOP = 8  # rows of a --show-probabilities table


def end_ids(options: dict[str, Any]) -> Collection[int]:
    """The end tokens, which are not printed."""
    from gptfast.generation.config import GenerationConfig

    return GenerationConfig(eos_token_id=options.get("eos_token_id")).eos_ids


def stream_one(gpt: GPT, tokenizer: Tokenizer, text: str, ids: list[list[int]], options: dict[str, Any]) -> int:
    """Print one sequence token by token; returns the number of new tokens."""
    from gptfast.generation import stream
    from gptfast.tokenizer import StreamDecoder

    ends = end_ids(options)
    steps, decoder, count = stream(gpt, ids, **options), StreamDecoder(tokenizer), 0
    print(text, end="", flush=True)
    for step in steps:
        count += 1
        token = step.tokens[0]
        if token is not None and token not in ends:
            print(decoder.push(token), end="", flush=True)
    print(decoder.finish())
    return count


def print_all(gpt: GPT, tokenizer: Tokenizer, ids: list[list[int]], options: dict[str, Any]) -> int:
    """Print the texts of all prompts; returns the number of new tokens."""
    copies, ends = options.get("num_return_sequences", 1), end_ids(options)
    rows = gpt.generate(ids, **options)
    for n, row in enumerate(rows):
        print(f"---- prompt {n // copies + 1}, continuation {n % copies + 1} " + "-" * 40)
        print(tokenizer.decode([token for token in row if token not in ends]))
    return sum(map(len, rows)) - copies * sum(map(len, ids))


def print_probabilities(gpt: GPT, tokenizer: Tokenizer, ids: list[list[int]], options: dict[str, Any]) -> int:
    """Print a table of the most likely tokens for each step, then the text; returns the number of new tokens."""
    from rich.console import Console

    from gptfast.generation import stream

    if len(ids) > 1 or options.get("num_return_sequences", 1) > 1 or options.get("num_beams", 1) > 1:
        raise ValueError("generate: --show-probabilities shows one sequence; give one prompt and no beams or copies")
    console, count, row, ends = Console(highlight=False), 0, list(ids[0]), end_ids(options)
    for count, step in enumerate(stream(gpt, ids, top=TOP, **options), start=1):
        console.print(_step_table(tokenizer, tokenizer.decode(row), step, count))
        row += [token for token in step.tokens if token is not None]
    print(tokenizer.decode([token for token in row if token not in ends]))
    return count


def _step_table(tokenizer: Tokenizer, text: str, step: Step, number: int) -> Any:
    from rich.markup import escape
    from rich.table import Table

    from gptfast.tokenizer import token_text

    drawn = step.tokens[0]
    title = escape(f"{number}: …{text[-40:]!r}")
    table = Table("next token", "probability", "", title=title, title_justify="left", box=None)
    shown = step.top[0]
    for token, probability in shown:
        mark = "[green]drawn[/]" if token == drawn else ""
        table.add_row(
            escape(repr(token_text(tokenizer, token))), f"{probability:6.1%} {'█' * round(40 * probability)}", mark
        )
    if drawn is not None and drawn not in [token for token, _ in shown]:
        table.add_row(escape(repr(token_text(tokenizer, drawn))), "less likely than these", "[green]drawn[/]")
    return table
