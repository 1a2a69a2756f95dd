"""Language modelling: windows of a long text, every token predicted from those before it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch

from gptfast.data import Mixture, TokenFile, sampler_of
from gptfast.data.packing import Batch
from gptfast.models import GPT, export
from gptfast.tokenizer import Tokenizer
from gptfast.training import bad_step
from gptfast.training.checks import check_model, check_ranks
from gptfast.training.compiling import compiler_errors
from gptfast.training.config import TrainConfig
from gptfast.training.copies import Copies
from gptfast.training.evaluate import evaluate, evaluated_tokens, evaluation_batches
from gptfast.training.gradients import accumulate_gradients
from gptfast.training.objective import Autocast, Evaluation, Objective
from gptfast.training.ranks import Ranks
from gptfast.training.routing import Routing
from gptfast.training.schedule import row_length
from gptfast.training.sharding import put, whole_copy
from gptfast.training.slow import SlowRanks
from gptfast.training.values import stored


class LanguageModelling(Objective):
    """Trains a GPT on tokens.

    Args:
        model: a float32 GPT.
        train_tokens, val_tokens: token files, or (N,) arrays of ids; train_tokens may be a mixture.
        config: of the run.
        tokenizer: saved with every checkpoint; None: no tokenizer.
        ranks: the processes that share every batch; None: this one has it all.
    Raises:
        TypeError, ValueError: see `check_model` and `WindowSampler`.
    """

    def __init__(
        self,
        model: GPT,
        train_tokens: TokenFile | Mixture | np.ndarray,
        val_tokens: TokenFile | np.ndarray,
        config: TrainConfig,
        tokenizer: Tokenizer | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if not model.config.causal:
            raise ValueError(
                "Trainer: objective is lm, but every position of the model sees the token that it is to predict (causal=False); "
                "take objective mlm"
            )
        self.block_size = check_model(model, config, train_tokens, val_tokens)
        self.network, self.tokenizer, self.val_tokens = model, tokenizer, val_tokens
        self.tokens_per_row = self.block_size
        if ranks is not None:
            check_ranks(config, ranks)
        self.ranks, rows = ranks, config.batch_size if ranks is None else ranks.rows(config.batch_size)
        self._first = 0 if ranks is None else ranks.share * rows
        self._routing = Routing.of(model, config, ranks)
        model.dropout_row, self._slow = self._first, SlowRanks()
        self._step: Any = torch.compile(model, fullgraph=True) if config.compile else model
        row_length(0, self.block_size, config)  # refuses what cannot be cut
        self.sampler = sampler_of(train_tokens, self.block_size, rows, config.seed, config.pack_documents)

    def batches(self, row: int, config: TrainConfig) -> list[Batch]:
        return self._batches(row, self._first, config)

    def _batches(self, row: int, first: int, config: TrainConfig) -> list[Batch]:
        passes = config.passes(row * self.block_size, self.block_size)
        return [self.sampler.batch_from(row + n * config.batch_size + first) for n in range(passes)]

    def batches_of(self, rank: int, row: int, step: int, config: TrainConfig) -> list[Batch]:
        assert self.ranks is not None
        first = rank // self.ranks.tensor * self.ranks.rows(config.batch_size)
        return self.cut(self._batches(row, first, config), step, config)

    def cut(self, batches: list[Batch], step: int, config: TrainConfig) -> list[Batch]:
        if not config.sequence_warmup:
            return batches
        length = row_length(step, self.block_size, config)
        self.network.dropout_row = self._first * (self.block_size // length)
        return [tuple(part.reshape(-1, length) for part in batch) for batch in batches]

    def add_gradients(self, batches: list[Batch], autocast: Autocast, device: torch.device) -> dict[str, Any]:
        if self._routing is not None:
            self._routing.begin()
        loss = self._gradients(batches, autocast, device)
        if self.ranks is not None and not self.ranks.sharding:
            trained = [p for p in self.network.parameters() if p.requires_grad]
            self.ranks.sum_gradients(trained, "the gradients")
        figures = {"loss": loss} | ({} if self._routing is None else self._routing.figures())
        return figures | ({} if self.ranks is None else self._slow.look(self.ranks.seconds))

    def _gradients(self, batches: list[Batch], autocast: Autocast, device: torch.device) -> Any:
        with compiler_errors():
            return accumulate_gradients(self._step, batches, autocast, device, self.ranks, self._routing)

    def evaluate(self, batch_size: int, config: TrainConfig, autocast: Autocast, device: torch.device) -> Evaluation:
        sizes = (self.block_size, batch_size, config.eval_batches)
        batches = evaluation_batches(self.val_tokens, *sizes, config.pack_documents)
        return Evaluation(evaluate(self.network, batches, autocast, device, self.ranks)[0])

    def evaluated_tokens(self, batch_size: int, config: TrainConfig) -> float:
        return evaluated_tokens(self.val_tokens, self.block_size, batch_size, config.eval_batches)

    def flops_per_token(self) -> float:
        return self.network.flops_per_token(self.block_size)

    def where_not_finite(
        self, batches: list[Batch], autocast: Autocast, device: torch.device, dropout_step: int | None
    ) -> tuple[str, int]:
        found, rank = bad_step.first_bad(self.network, batches, autocast, device, dropout_step, self.ranks)
        return found or "nothing when the step is repeated", rank

    def keep(self, folder: Path, batches: list[Batch], about: dict[str, Any], rank: int = 0) -> str:
        if self.ranks is None:
            bad_step.keep(folder, self.network, batches, about)
        else:
            network = whole_copy(self.network, self.ranks) if self.ranks.sharding else self.network
            about = {**about, "first_row": rank // self.ranks.tensor * len(batches[0][0])}
            what = "the step that went wrong"
            self.ranks.main_first(lambda: bad_step.keep(folder, network, batches, about), what)
        return f"python -m gptfast.training.bad_step {quote(str(folder))}"

    def restore(self, folder: Path) -> None:
        put(self.network, stored(folder)[1], self.ranks)

    def writer(self, copies: Copies | None) -> Callable[[Path], None]:
        export.check(self.network, patched=True)  # a probe in forward must not cost a run its checkpoints
        described = export.described(self.network)
        return described.write if copies is None else described.copied(copies.take).write

    def write(self, folder: Path) -> None:
        self.writer(None)(folder)
