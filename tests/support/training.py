"""A small text, model and configuration of the tests of training."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from gptfast.models import GPT, GPTConfig
from gptfast.tokenizer import CharTokenizer
from gptfast.training import TrainConfig, Trainer, read_checkpoint
from gptfast.training.log import read_log

MUON = TrainConfig(optimizer="muon")
TEXT = "she sells sea shells by the sea shore. the shells she sells are sea shells, i am sure.\n" * 12
TOKENIZER = CharTokenizer.train(TEXT)
TOKENS = np.array(TOKENIZER.encode(TEXT), np.uint16)
TRAIN, VAL = TOKENS[:900], TOKENS[900:]
SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=TOKENIZER.vocab_size, dropout=0.1)
QUICK = TrainConfig(
    batch_size=4, max_steps=12, eval_every=3, eval_batches=2, log_every=1, dtype="float32", device="cpu"
)


def make_trainer(out: Path, config: TrainConfig = QUICK, shape: GPTConfig = SHAPE, **options) -> Trainer:
    torch.manual_seed(3)
    return Trainer(GPT(shape), TRAIN, VAL, config, out, tokenizer=TOKENIZER, progress=False, **options)


def resumed(out: Path, config: TrainConfig, **options) -> Trainer:
    checkpoint = read_checkpoint(out / "last")
    model = GPT.from_pretrained(out / "last")
    return Trainer(model, TRAIN, VAL, config, out, tokenizer=TOKENIZER, progress=False, resume=checkpoint, **options)


MEASURED = ("seconds", "tokens_per_second", "mfu", "memory_gb", "peak_memory_gb", "cpu_temperature")


def timeless(path: Path) -> list[dict]:
    """The log of a run without what a clock or a sensor gave."""
    return [{k: v for k, v in record.items() if k not in MEASURED} for record in read_log(path / "log.jsonl")]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Every write past so many bytes of a file fails, as on a full disk; only inside, as pytest writes its report too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
