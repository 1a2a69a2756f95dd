"""gptfast evaluate: how well models predict texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptfast._json import to_text
from gptfast._options import Whole, check_fields, option, options_of, values_of
from gptfast.cli._evaluate_needle import needles, show_needles
from gptfast.cli._evaluate_task import evaluate_tasks, show_tasks
from gptfast.cli._evaluate_texts import perplexities, show_texts
from gptfast.cli._load import MODEL_HELP, QUANTIZE_HELP, TOKENIZER_HELP
from gptfast.cli._options import Change, Options, takes

FORMATS = ("int8", "int6", "q4", "int4", "nf4", "mxfp4", "bf16", "fp32")


@dataclass(frozen=True)
class Models:
    """What `gptfast evaluate` judges."""

    models: list[str] | None = option(
        None, "With `compare`: the models, the first one being what the others are held against."
    )
    model: str | None = option(None, MODEL_HELP)
    quantize: str | None = option(
        None, f"{QUANTIZE_HELP}. Without it the model runs in torch, with its weights as they are."
    )
    adapter: str | None = option(None, "Folder of an adapter of `model`, by GPT.save_adapter or peft.")
    tokenizer: str | None = option(None, TOKENIZER_HELP, words="the checkpoint's own")
    compare: bool = option(
        False,
        "Compare the MODELS on the same documents: mean difference in nats a token, with its standard error. A format of the "
        "engine follows a colon: runs/bard/best:int8.",
    )


@dataclass(frozen=True)
class Texts:
    """The texts and how they are cut."""

    data: str | None = option(
        None,
        "Measure perplexity on this: a text file, which is one stream; or a file of records such as .jsonl, each a document that no other sees; or a folder "
        "of text files; or shakespeare.",
    )
    text_field: str = option("text", "The field of a record that holds its text.")
    context: int | None = option(None, "Most tokens in a window.", words="the model's block size")
    stride: int | None = option(
        None,
        "Tokens from one window to the next. With `stride` equal to `context` windows do not overlap: the fastest, the "
        "highest perplexity, and the first token of each window is not scored.",
        words="half of `context`",
    )
    bos: bool = option(
        False, "Put the model's first token before each document, so that its own first token is scored."
    )
    join: bool = option(False, "Make one stream of the documents, with the end token between two.")
    detokenize: str = option("none", "Undo the spaces of WikiText's files before tokens are made: wikitext, or none.")


@dataclass(frozen=True)
class Tasks:
    """A task to solve from examples in the prompt."""

    task: str | None = option(
        None,
        "Measure accuracy on this instead: genre, cloze, copying, reversal, addition, arithmetic, induction, or a file of records such as .jsonl, "
        "whose items are shown before each other.",
    )
    template: str | None = option(
        None,
        "Makes a prompt of an item: sentiment, translation, arithmetic, arithmetic-cot, or a Jinja2 file.",
        words="that of the task",
    )
    labels: str | None = option(
        None,
        "Labels to choose from, such as positive,negative; without, an item's answer must be the most likely text.",
    )
    shots: str = option("0", "Solved items before each prompt; several numbers such as 0,1,4 make a curve.")
    normalize: str = option(
        "sum", "How labels are ranked: sum of log-probabilities, per token, per byte, or calibrated."
    )
    limit: int | None = option(None, "Number of items to solve.", words="all")
    seed: int = option(0, "Decides the shots, and the items of tasks that are generated.")
    samples: int | None = option(
        None,
        "Let the model write an answer, this many times for each item; the answer of most texts counts (self-consistency). With "
        "--template arithmetic-cot it thinks before it answers.",
        words="nothing is written: labels or answers are scored by likelihood",
    )
    temperature: float | None = option(
        None,
        "With `samples`: temperature of the texts; 0: the likeliest token each time.",
        words="0.7; 0 for one sample",
    )
    max_new_tokens: int | None = option(
        None,
        "With `samples`: most tokens of a text, which ends at a blank line too.",
        words="128, or half of a shorter context",
    )
    answer_pattern: str | None = option(
        None,
        "With `samples`: a regular expression that finds the answer in a text; its first group is the answer.",
        words="that of the template, or the first line",
    )
    log_samples: bool = option(False, "Add every prompt with its scores, or with the texts after it, to the results.")


@dataclass(frozen=True)
class LongContext:
    """What a model makes of a long context."""

    by_position: bool = option(
        False,
        "With `data`: perplexity by how many tokens stand before a token, in windows that do not overlap; positions.png in `out`.",
    )
    needle: bool = option(
        False,
        "Hide a pass key in a long text and see whether the model finds it, by the text's length and the key's depth; needle.png "
        "in `out`. With `data` the haystack is that text, else sentences about grass and the sky.",
    )
    lengths: str | None = option(
        None,
        "With `needle`: tokens of the texts, such as 1024,4096.",
        words="the context, and halves down to an eighth",
    )
    depths: int = option(
        5, "With `needle`: number of places, from the beginning of a text to its end.", allowed=Whole(1)
    )
    trials: int = option(3, "With `needle`: keys at each length and depth.", allowed=Whole(1))


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    out: Path | None = option(None, "Folder for results.json, and a picture of a task or of a long context.")
    json: bool = option(False, "Print one JSON object instead of a table.")


_CHANGES = {"models": Change(argument=True)}


@takes(
    Options(Models, changes=_CHANGES),
    Options(Texts, changes={"bos": Change(both=True)}),
    Options(Tasks),
    Options(LongContext),
    Options(Output),
)
def evaluate(options: dict[str, Any]) -> None:
    """Measure a model: how well it predicts texts (--data), how many items of a task it solves from examples (--task), or
    whether it finds a key in a long text (--needle).

    A text longer than the context is scored in overlapping windows, as the documentation of transformers does, with an exact
    sum. What was scored and how is part of the result.

    [bold]Examples[/]

      Perplexity by token, word, character and byte:

      [cyan]gptfast evaluate --model runs/bard/best --data plays.txt[/]

      A document a line, {"text": ...}, in the native engine with 8-bit weights:

      [cyan]gptfast evaluate --model gpt2 --data texts.jsonl --quantize int8 --json[/]

      What 8 and 4 bits cost, on the same documents:

      [cyan]gptfast evaluate --compare gpt2 gpt2:int8 gpt2:q4 --data texts.jsonl[/]

      A model with an adapter:

      [cyan]gptfast evaluate --model runs/bard/best --adapter runs/poems --data sonnets.txt[/]

      Accuracy by the number of solved items in the prompt, with a picture:

      [cyan]gptfast evaluate --model gpt2 --task copying --shots 0,1,2,4,8 --out runs/copying[/]

      A task of your own, {"text": ..., "label": ...} a line:

      [cyan]gptfast evaluate --model gpt2 --task reviews.jsonl --template sentiment --labels positive,negative --shots 0,4[/]

      A longer context before and after its training, and whether a key in it is found:

      [cyan]gptfast evaluate --compare runs/short/best runs/long/best --data plays.txt --by-position --out runs/positions[/]

      [cyan]gptfast evaluate --model runs/long/best --needle --out runs/needle[/]

      Chains of thought, and the majority of five:

      [cyan]gptfast evaluate --model gpt2 --task arithmetic --template arithmetic-cot --shots 2 --samples 5 --log-samples[/]
    """
    given, texts = Models(**values_of(Models, options)), Texts(**values_of(Texts, options))
    tasks, output = Tasks(**values_of(Tasks, options)), Output(**values_of(Output, options))
    long = LongContext(**values_of(LongContext, options))
    check_fields("evaluate", long)
    names = _names(given)
    _check_kind(options, texts, tasks, long)
    written = set(options) & {"temperature", "max_new_tokens", "answer_pattern"}
    if tasks.samples is None and written:
        raise ValueError(
            f"evaluate: `{sorted(written)[0]}` goes with `samples`, texts to write; give it, or leave this out"
        )
    if tasks.samples is not None and "normalize" in options:
        raise ValueError(
            "evaluate: `normalize` ranks labels by likelihood and `samples` writes texts; give one of them"
        )
    if tasks.task is not None:
        value, show = evaluate_tasks(names, given.tokenizer, given.adapter, tasks, output), show_tasks
    elif long.needle:
        value, show = needles(names, given, texts, tasks.seed, long, output.out), show_needles
    else:
        value, show = perplexities(names, given, texts, output.out, long.by_position), show_texts
    if output.out is not None:
        _write(output.out, value)
    if output.json:
        print(to_text(value, 2))
    else:
        show(value)


def _check_kind(options: dict[str, Any], texts: Texts, tasks: Tasks, long: LongContext) -> None:
    """Raise ValueError for options of more than one kind of evaluation, or of none."""
    if long.needle and long.by_position:
        raise ValueError("evaluate: `needle` and `by_position` are two evaluations; give one of them")
    if (texts.data is None) == (tasks.task is None) and not (long.needle and tasks.task is None):
        raise ValueError(
            "evaluate: give `data`, a text to predict, `task`, items to solve, or `needle`, a key to find: one of them"
        )
    of_needle = set(options) & {"lengths", "depths", "trials"}
    if of_needle and not long.needle:
        raise ValueError(f"evaluate: `{sorted(of_needle)[0]}` goes with `needle`; give it, or leave this out")
    kind = "task" if tasks.task else "needle" if long.needle else "data"
    strange = {
        "task": {*options_of(Texts), "by_position", "needle"},
        "data": set(options_of(Tasks)),
        "needle": {*options_of(Tasks), *options_of(Texts)} - {"seed", "data", "text_field"},
    }[kind]
    others = {name for name in set(options) & strange if options[name] is not False}
    if others:
        raise ValueError(f"evaluate: `{sorted(others)[0]}` does not go with `{kind}`; leave it out")


def _write(folder: Path, value: dict[str, Any]) -> None:
    from gptfast._files import atomic_write

    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "results.json", (to_text(value, 2) + "\n").encode())


def _names(given: Models) -> list[tuple[str, str | None]]:
    """(model, format) of each model to judge."""
    listed = given.models or []
    if given.compare:
        if len(listed) < 2 or given.model or given.quantize or given.adapter:
            raise ValueError(
                "evaluate: `compare` takes at least two models and their formats as arguments: --compare A B:int8, without "
                "`model`, `quantize` and `adapter`"
            )
        return [_divided(name) for name in listed]
    if listed or not given.model:
        raise ValueError("evaluate: no `model`; give --model FOLDER, or --compare A B to compare several")
    return [(given.model, given.quantize)]


def _divided(name: str) -> tuple[str, str | None]:
    path, colon, format = name.rpartition(":")
    if not colon or Path(name).exists():
        return name, None
    if format not in FORMATS:
        raise ValueError(
            f"evaluate: {name!r} has format {format!r} after its colon; expected one of {', '.join(FORMATS)}"
        )
    return path, format
