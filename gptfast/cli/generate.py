"""gptfast generate: a GPT writes."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptfast.cli._load import MODEL_HELP, TOKENIZER_HELP, check_batch_size, load
from gptfast.cli._prompts import encode, read_prompts
from gptfast.cli._show import print_all, print_probabilities, stream_one

if TYPE_CHECKING:
    from gptfast.models import GPT
    from gptfast.tokenizer import Tokenizer

TEMPERATURE = 0.8


def generate(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to continue; give it several times for several. Without any it is read from standard input. "
            "<|endoftext|> begins a new document, where the tokenizer has that token."
        ),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Read one prompt from this UTF-8 text file instead; a newline at its very end is left out."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP, show_default="the checkpoint's own")] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(
            help="Special tokens in prompts, such as <|endoftext|>, count as such; without, as ordinary text."
        ),
    ] = True,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help="How many tokens to add to each prompt, at most.",
            show_default="200, or fewer where the model has no more room",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Below 1: safer and more repetitive. Above: bolder. 0: always the most likely token.",
            show_default=str(TEMPERATURE),
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Draw among the k most likely tokens only; 0: among all.", show_default="0")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Draw among the most likely tokens whose probabilities reach p.", show_default="1.0"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Draw among tokens at least p times as likely as the likeliest.", show_default="0.0"),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Above 1: tokens that the text holds already become less likely.", show_default="1.0"),
    ] = None,
    presence_penalty: Annotated[
        float, typer.Option(help="Is taken from the score of every token that the new text holds.")
    ] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same for every time that it holds the token.")] = 0.0,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(help="No n tokens in a row come twice; 0: no such rule.", show_default="0")
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End a text with the token that completes this; may be given several times."),
    ] = None,
    overflow: Annotated[
        str,
        typer.Option(help="Past the model's block size: 'error', or 'slide', which forgets the older half when full."),
    ] = "error",
    seed: Annotated[int, typer.Option(help="Of the draws: the same seed writes the same text again.")] = 0,
    num_return_sequences: Annotated[int, typer.Option(help="Continuations of each prompt.")] = 1,
    num_beams: Annotated[
        int, typer.Option(help="Search for the most likely text over so many beams, instead of drawing.")
    ] = 1,
    length_penalty: Annotated[
        float | None,
        typer.Option(help="With beams: above 0 favours longer text, below shorter.", show_default="1.0"),
    ] = None,
    do_sample: Annotated[bool, typer.Option("--do-sample", help="With beams: draw them.")] = False,
    prompt_lookup_num_tokens: Annotated[
        int, typer.Option(help="Guess so many tokens ahead where the text repeats itself: the same text, sooner.")
    ] = 0,
    assistant_model: Annotated[
        str | None, typer.Option(help="A smaller model of the same tokens guesses ahead: the same text, sooner.")
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help='A file with a prompt a line, as JSON: "To be", or {"prompt": "To be", "temperature": 0.5}.'),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="With --input: where the texts go, a line each. Lines that it has are kept, whichever model wrote them."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --input: how many texts are written at a time.")] = 16,
    show_probabilities: Annotated[
        bool,
        typer.Option(
            "--show-probabilities",
            help="At each step, show the most likely next tokens (before top-k and top-p) and which was drawn.",
        ),
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Pack the weights in int8, int6, q4, int4, nf4, bf16 or fp32 for the native CPU engine: the fewer bits the "
            "faster, and the further from the model. Without it the engine takes them as they are.",
        ),
    ] = None,
) -> None:
    """Continue a text, token by token.

    What is not given is taken from the checkpoint's generation_config.json, where it says so (see gptfast info).

    [bold]Examples[/]

      Write on, a little less boldly than the model would:

      [cyan]gptfast generate --model runs/bard/best --prompt "ROMEO:" --temperature 0.8 --top-p 0.95[/]

      Three different continuations:

      [cyan]gptfast generate --model runs/bard/best --prompt "To be" --num-return-sequences 3[/]

      Look over the model's shoulder: what it holds likely at each step:

      [cyan]gptfast generate --model runs/bard/best --prompt "To be" --max-new-tokens 12 --show-probabilities[/]

      The most likely text that four beams find:

      [cyan]gptfast generate --model runs/bard/best --prompt "To be" --num-beams 4[/]

      A file of prompts; the same command goes on after a kill:

      [cyan]gptfast generate --model runs/bard/best --input prompts.jsonl --output texts.jsonl[/]
    """
    from gptfast.batch import default_new_tokens
    from gptfast.models.metadata import without_greedy

    drawn = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    options: dict[str, Any] = {
        **_method(num_beams, do_sample, drawn, length_penalty),
        "seed": seed,
        "num_return_sequences": num_return_sequences,
        "num_beams": num_beams,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "overflow": overflow,
        "prompt_lookup_num_tokens": prompt_lookup_num_tokens,
    }
    limits = {
        "max_new_tokens": max_new_tokens,
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
    }
    options |= {name: value for name, value in limits.items() if value is not None}
    options |= {"stop_strings": stop} if stop else {}
    if (input is None) != (output is None):
        raise ValueError("generate: --input and --output go together; give both, or neither")
    texts = [] if input else read_prompts(prompt, prompt_file)
    gpt, encoding = load(model, quantize, tokenizer)
    usual, drawing = _defaults(gpt, encoding)
    options = {**usual, **options}
    if input is not None and output is not None:
        if prompt or prompt_file or assistant_model or show_probabilities:
            raise ValueError(
                "generate: --input with --prompt, --prompt-file, --assistant-model or --show-probabilities; a file of "
                "prompts needs none of them - leave them out"
            )
        return _run_file(gpt, encoding, input, output, batch_size, options, drawing, special_tokens)
    if num_beams == 1 or do_sample:
        options = {**(without_greedy(drawing) if do_sample else drawing), **options}
    ids = [encode(encoding, text, special_tokens) for text in texts]
    options.setdefault("max_new_tokens", default_new_tokens(gpt, max(map(len, ids)), options))
    options["tokenizer"] = encoding
    options |= {"assistant_model": load(assistant_model, None, tokenizer)[0]} if assistant_model else {}
    start = time.perf_counter()
    if show_probabilities:
        count = print_probabilities(gpt, encoding, ids, options)
    elif len(ids) == 1 and num_return_sequences == 1 and num_beams == 1:
        count = stream_one(gpt, encoding, texts[0], ids, options)
    else:
        count = print_all(gpt, encoding, ids, options)
    seconds = time.perf_counter() - start
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.0f} tokens/s", file=sys.stderr)


def _run_file(
    gpt: GPT,
    tokenizer: Tokenizer,
    source: Path,
    output: Path,
    batch_size: int,
    options: dict[str, Any],
    drawing: dict[str, Any],
    special_tokens: bool,
) -> None:
    """Every prompt of a file, with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from gptfast.batch import read_jobs, run_jobs

    check_batch_size("generate", batch_size)
    jobs = read_jobs(source, gpt, tokenizer, options, drawing, special_tokens)
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


def _method(num_beams: int, do_sample: bool, drawing: dict[str, Any], length_penalty: float | None) -> dict[str, Any]:
    """The options of drawing or of beam search; those of the other must not have been given."""
    given = {name: value for name, value in drawing.items() if value is not None}
    given |= {"do_sample": True} if do_sample else {}
    if num_beams > 1 and do_sample:
        return given if length_penalty is None else given | {"length_penalty": length_penalty}
    if num_beams > 1:
        if given:
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise ValueError(
                f"generate: {flags} with --num-beams {num_beams}; beam search draws nothing - leave one out, or add --do-sample"
            )
        return {} if length_penalty is None else {"length_penalty": length_penalty}
    if length_penalty is not None:
        raise ValueError("generate: --length-penalty ranks beams, but there is one; give --num-beams 2 or more as well")
    return given


def _defaults(gpt: GPT, tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is not given: for every text, and for texts that are drawn."""
    from gptfast.models.metadata import drawing, end_option, metadata_of

    metadata = metadata_of(gpt)
    usual = metadata.defaults()
    usual.pop("max_new_tokens", None)  # as far as there is room, see `default_new_tokens`
    drawn = drawing(usual)
    usual = {name: value for name, value in usual.items() if name not in drawn}
    usual["eos_token_id"] = end_option(metadata.end_tokens(gpt.config.vocab_size, [tokenizer.eos_id]))
    return usual, {"temperature": TEMPERATURE, **drawn}
