"""gptfast train: a GPT from text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gptfast.cli._run import describe, report

_OUT = Path("runs/gpt")
_DATA, _MODEL, _OPTIMISER, _RUN = "Data", "Model", "Learning", "The run"


def _option(group: str, default: str, help: str, *names: str) -> typer.models.OptionInfo:
    """An option whose default depends on the others: `default` says in words what it is."""
    return typer.Option(*names, help=help, show_default=default, rich_help_panel=group)


def train(
    data: Annotated[
        str | None,
        _option(
            _DATA,
            "shakespeare",
            "What to learn from: 'shakespeare' (42 plays and poems, built in), a UTF-8 text file, a folder of .txt files, "
            "a file or folder of records (see --text-field), a folder made by gptfast prepare, or a token file. A tenth of "
            "it is kept for validation.",
        ),
    ] = None,
    glob: Annotated[
        list[str] | None,
        _option(
            _DATA, "*.txt", "Which files of a folder to read, such as '*.md'; may be given several times.", "--glob"
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        _option(
            _DATA,
            "none",
            "The field of a record that is the text, in .jsonl, .json, .csv, .tsv and .parquet files; each record is a "
            "document.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        _option(
            _DATA,
            "char; gpt2 with --preset",
            "How text becomes numbers. char: one token per character, good for small models and minutes of training. "
            "gpt2: GPT-2's 50257 subwords. bpe, word: learnt from the text. Or the FOLDER of a checkpoint.",
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, _option(_DATA, "8192 for bpe, all words for word", "How many tokens bpe or word learns.")
    ] = None,
    unk: Annotated[bool | None, _option(_DATA, "off", "char: <|unk|> for characters not in the text.", "--unk")] = None,
    preset: Annotated[
        str | None,
        _option(
            _MODEL,
            "none",
            "The shape of a published model: gpt1, gpt2, gpt2-medium, gpt3-125m, ... (gptfast info lists them). The "
            "options below change it.",
        ),
    ] = None,
    init_from: Annotated[
        str | None,
        _option(
            _MODEL,
            "none",
            "Start from the weights of a checkpoint FOLDER, nanoGPT's ckpt.pt or a hub id instead of random ones.",
        ),
    ] = None,
    n_layer: Annotated[int | None, _option(_MODEL, "4", "Blocks, one on top of the other.")] = None,
    n_head: Annotated[int | None, _option(_MODEL, "4", "Attention heads in a block.")] = None,
    n_embd: Annotated[
        int | None, _option(_MODEL, "256", "Channels: how wide the model is, a multiple of --n-head.")
    ] = None,
    block_size: Annotated[
        int | None, _option(_MODEL, "128", "How many tokens the model can look back on; longer costs time.")
    ] = None,
    dropout: Annotated[
        float | None,
        _option(
            _MODEL,
            "0, or the preset's; 0.1 with --init-from",
            "Part of the activations set to zero at random. It keeps a model from learning a small text by heart "
            "(try 0.1 or 0.2 where the validation loss rises again).",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        _option(
            _OPTIMISER,
            "32; 8 with --preset",
            "Rows of text in one pass. Larger is steadier, and slower a step. May change on --resume, as --grad-accum may.",
        ),
    ] = None,
    grad_accum: Annotated[
        int | None,
        _option(_OPTIMISER, "1", "Passes summed into one step: a larger batch without more memory."),
    ] = None,
    optimizer: Annotated[
        str | None,
        _option(
            _OPTIMISER,
            "adamw",
            "adamw; or muon, which evens out the steps of the matrices inside the blocks: it learns more from a token, "
            "and takes longer for a step.",
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        _option(
            _OPTIMISER,
            "2e-3; 6e-4 with --preset; 1e-4 with --init-from",
            "How far a step goes, at its largest. Too high and the loss jumps; too low and it crawls.",
        ),
    ] = None,
    min_lr: Annotated[float | None, _option(_OPTIMISER, "a tenth of --learning-rate", "Where the cosine ends.")] = None,
    warmup_steps: Annotated[
        int | None,
        _option(_OPTIMISER, "100, at most a tenth of the steps", "Steps over which the learning rate rises from 0."),
    ] = None,
    lr_decay_steps: Annotated[
        int | None, _option(_OPTIMISER, "the last step", "The step at which the learning rate reaches its lowest.")
    ] = None,
    weight_decay: Annotated[float | None, _option(_OPTIMISER, "0.1", "Pull of the matrices towards 0 (AdamW).")] = None,
    grad_clip: Annotated[
        float | None, _option(_OPTIMISER, "1.0", "Longest gradient; a longer one is shortened. 0: never.")
    ] = None,
    max_steps: Annotated[
        int | None, _option(_RUN, "2000, or no limit with --max-minutes", "How many steps to train.")
    ] = None,
    max_minutes: Annotated[
        float | None,
        _option(
            _RUN,
            "no limit",
            "How long to train. As many steps as fit are planned from the measured speed, so that the learning rate "
            "still ends low.",
        ),
    ] = None,
    eval_every: Annotated[int | None, _option(_RUN, "250", "Steps between looks at the validation text.")] = None,
    eval_batches: Annotated[
        int | None, _option(_RUN, "20", "Batches of validation text, the same each time; 0: all of it.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, _option(_RUN, "--eval-every", "Steps between checkpoints in OUT/last.")
    ] = None,
    log_every: Annotated[int | None, _option(_RUN, "10", "Steps between records in OUT/log.jsonl.")] = None,
    seed: Annotated[
        int | None,
        _option(
            _RUN,
            "0",
            "Chooses the first weights, the order of the text and the dropout. The same command and seed give the same "
            "bits on the same machine, busy or not (with --max-minutes as many steps as the time allows).",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        _option(
            _RUN,
            "bfloat16 where the CPU (AVX-512 BF16, AMX) or GPU has it",
            "Of the matrix products: float32, or bfloat16 (8 bits of precision; weights stay float32).",
        ),
    ] = None,
    device: Annotated[str | None, _option(_RUN, "cuda where there is one", "cpu or cuda.")] = None,
    threads: Annotated[int | None, _option(_RUN, "all cores", "CPU threads.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, log and plot.", rich_help_panel=_RUN)] = _OUT,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in OUT, bit for bit.", rich_help_panel=_RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in OUT.", rich_help_panel=_RUN)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write event files for TensorBoard too.", rich_help_panel=_RUN)
    ] = False,
) -> None:
    """Train a GPT to predict the next token of a text.

    Without options it learns to write Shakespeare, character by
    character, in minutes on a laptop.

    The loss is how surprised the model is by the next token, in nats:
    ln(vocabulary) for pure guessing (4.5 for 90 characters), less as it
    learns. The training loss is of text that it learns from, the
    validation loss of text that it never sees: that is the one that counts.

    OUT/last is the newest checkpoint and OUT/best the one with the lowest
    validation loss; each is a complete folder for gptfast generate and for
    transformers. Ctrl-C saves and stops; --resume goes on.
    """
    given = {name: value for name, value in locals().items() if value is not None and value != []}
    from gptfast.malloc import tune_malloc
    from gptfast.training import launch

    tune_malloc()
    if resume:
        run = launch.resumed_run(given)
    else:
        run = launch.new_run({"data": "shakespeare", **given})
    for line in describe(run):
        run.trainer.progress.note(line)
    result = run.trainer.train()
    for line in report(run, result):
        run.trainer.progress.note(line)
    if result.interrupted is not None:
        raise typer.Exit(128 + result.interrupted)
