"""gptfast finetune: a model that does a task, from a GPT and examples."""

from __future__ import annotations

from typing import Any

import typer

from gptfast.cli._finetune import compare, describe, report, show_batch
from gptfast.cli._options import Change, Options, takes
from gptfast.finetuning.options import TRAINING, MethodOptions, RunOptions, TaskOptions, defaults_in_words
from gptfast.training.config import TrainConfig

_HELP = {
    "max_steps": "Steps to train.",
    "batch_size": "Examples in one forward and backward pass.",
    "grad_accum": "Passes whose gradients are summed into one step.",
    "eval_every": "Steps between evaluations on the held-out examples.",
    "seed": "Seed of new weights, of the order of the examples and of dropout. The same command and seed give the same bits.",
}
_WORDS = defaults_in_words()
_CHANGES = {name: Change(words=_WORDS.get(name, ""), help=_HELP.get(name, "")) for name in {**_HELP, **_WORDS}}


@takes(
    Options(TaskOptions),
    Options(MethodOptions),
    Options(TrainConfig, TRAINING, changes=_CHANGES),
    Options(RunOptions),
)
def finetune(options: dict[str, Any]) -> None:
    """Fine-tune a GPT: to classify, compare or choose, or to reply.

    Each line of the data is a JSON object with the fields of its task, or a line
    of CSV under their names; Parquet is read too:

    classification  {"text": "To be, or not", "label": "tragedy"}

    entailment      {"premise": "A cat sat.", "hypothesis": "It stood.", "label": "contradiction"}

    similarity      {"text1": "A cat.", "text2": "Some cat.", "score": 4.5}

    choice          {"context": "It rained, so", "choices": ["he got wet", "he ate"], "label": 0}

    lm              {"text": "To be, or not to be"}

    chat            {"prompt": "Who?", "response": "Romeo."} or {"messages": [{"role": "user", "content": "Who?"}, …]}

    A text that is longer than the model's context is cut at its end and counted
    as truncated; for lm it becomes several rows.

    The result is judged on examples that are not learnt from. For tasks with
    labels compare it with the baseline: always saying the most frequent class.

    OUT/best is the best step: with method full a whole model, else an adapter
    that is loaded on its model. OUT/metrics.json has the figures, OUT/loss.png
    the learning curve, OUT/confusion.png which classes or choices are confused.
    Ctrl-C saves and stops; --resume continues.

    [bold]Examples[/]

      Train every weight to tell classes apart, and judge by a file of its own:

      [cyan]gptfast finetune --model runs/bard/best --data train.jsonl --eval-data test.jsonl --task classification[/]

      Train small matrices beside the frozen weights (LoRA), with the first rows shown:

      [cyan]gptfast finetune --model gpt2 --data chats.jsonl --task chat --method lora --show-batch --out runs/chat[/]

      The same beside weights in 4 bits, for a large model:

      [cyan]gptfast finetune --model gpt2-xl --data chats.jsonl --task chat --method qlora --recompute --out runs/chat[/]

      Which method suits the task?

      [cyan]gptfast finetune --model runs/bard/best --data train.jsonl --task classification --compare --out runs/methods[/]
    """
    from gptfast.finetuning.launch import new_run, resumed_run
    from gptfast.finetuning.results import finish
    from gptfast.malloc import tune_malloc

    if options.get("compare"):
        return compare(options)
    tune_malloc()
    run = resumed_run(options) if options.get("resume") else new_run(options)
    note = run.loop.progress.note
    for line in describe(run):
        note(line)
    if options.get("show_batch"):
        show_batch(run)
    result = run.loop.train()
    for line in report(run, result, finish(run, result)):
        note(line)
    if result.interrupted is not None:
        raise typer.Exit(128 + result.interrupted)
    return None
