"""BERT's pre-training: masked tokens predicted from both sides, and whether the second text follows the first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gptfast import ops
from gptfast.data import Mixture, TokenFile
from gptfast.data.masked import MaskedMixtureSampler, MaskedSampler, MaskTokens
from gptfast.models import BERT, export
from gptfast.tokenizer import Tokenizer
from gptfast.training.checks import check_model
from gptfast.training.compiling import compiler_errors
from gptfast.training.config import TrainConfig
from gptfast.training.copies import Copies
from gptfast.training.objective import Autocast, Evaluation, Objective
from gptfast.training.ranks import Ranks
from gptfast.training.slow import SlowRanks

Batch = dict[str, Tensor]
_LOGITS = 1 << 26  # largest number of logits of a forward pass
_IGNORED = -100


class MaskedLanguageModelling(Objective):
    """Trains a BERT on tokens; see `gptfast.data.masked`.

    The loss is the mean cross-entropy of the masked tokens, and that of next sentences is added where the model has the head and
    the config does not leave it out. The log has both, and of an evaluation the part that was right too.

    Args:
        model: a float32 BERT.
        train_tokens, val_tokens: token files, or (N,) arrays of ids; train_tokens may be a mixture.
        config: of the run.
        tokenizer: with [MASK], [CLS] and [SEP]; saved with every checkpoint.
        ranks: the processes that share every batch and have the whole model each; None: this one has it all.
    Raises:
        TypeError, ValueError: a GPT, a tokenizer without masks, or an option that this objective does not have; a batch that does
            not divide.
    """

    def __init__(
        self,
        model: BERT,
        train_tokens: TokenFile | Mixture | np.ndarray,
        val_tokens: TokenFile | np.ndarray,
        config: TrainConfig,
        tokenizer: Tokenizer | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if model.config.causal or not model.config.head_transform:
            what = (
                "causal: a mask would be seen by later tokens only"
                if model.config.causal
                else "without a head for masks"
            )
            raise ValueError(
                f"Trainer: objective is mlm, but the model is {what}; train a BERT (`preset` bert-base), or take objective lm"
            )
        if ranks is not None and ranks.sharding:
            raise ValueError(
                "train: `objective` mlm needs the whole model in each process, but `parallel` fsdp leaves it a part; use `parallel` ddp"
            )
        self.ranks, self._rows = ranks, config.batch_size if ranks is None else ranks.rows(config.batch_size)
        self._first = 0 if ranks is None else ranks.share * self._rows
        model.dropout_row, self._slow = self._first, SlowRanks()
        self.block_size = check_model(model, config, train_tokens, val_tokens)
        self.network, self.tokenizer, self.val_tokens = model, tokenizer, val_tokens
        self.tokens_per_row = self.block_size
        self._special = MaskTokens.of(tokenizer)
        self._pairs = model.config.next_sentence_head and not config.no_next_sentence
        self._read = torch.compile(model.hidden_states, fullgraph=True) if config.compile else model.hidden_states
        self.sampler = self._sampler(train_tokens, config, config.seed)
        self._held_out = self._sampler(val_tokens, config, 0)

    def _sampler(self, tokens: Any, config: TrainConfig, seed: int) -> Any:
        kind: Any = MaskedMixtureSampler if isinstance(tokens, Mixture) else MaskedSampler
        about = (self._special, self.network.config.vocab_size, seed, config.mlm_probability, config.whole_words)
        return kind(tokens, self.block_size, self._rows, *about, self._pairs)

    def batches(self, row: int, config: TrainConfig) -> list[Batch]:
        passes = config.passes(row * self.block_size, self.block_size)
        return [self.sampler.batch_from(row + n * config.batch_size + self._first) for n in range(passes)]

    def add_gradients(self, batches: list[Batch], autocast: Autocast, device: torch.device) -> dict[str, Any]:
        """Each masked token counts the same in the loss, whichever pass or process has it; so does each pair of texts."""
        counts = [int((batch["labels"] != _IGNORED).sum()) for batch in batches]
        every, shares, start, waited = sum(counts), 1, time.perf_counter(), 0.0
        if self.ranks is not None:
            every, shares = int(self.ranks.sum([every], "the counts of targets")[0]), self.ranks.shares
            start, waited = time.perf_counter(), self.ranks.waited
        masked = torch.zeros((), dtype=torch.float64, device=device)
        follows = torch.zeros_like(masked)
        for batch, count in zip(batches, counts, strict=True):
            with compiler_errors(), autocast():
                hidden, moved = self._hidden(batch, device, self._read)
                loss = self.network.masked_loss(hidden, moved["labels"]) * (count / every)
                masked += loss.detach()
                if self._pairs:
                    logits = self.network.next_sentence_logits(hidden)
                    second = ops.cross_entropy(logits, moved["next_sentence_label"]) / (len(batches) * shares)
                    follows += second.detach()
                    loss = loss + second
            with compiler_errors():
                loss.backward()
        if self.ranks is not None:
            return self._summed(self.ranks, masked, follows, time.perf_counter() - start - (self.ranks.waited - waited))
        found = self._figures(masked, follows)
        return found if device.type == "cuda" else _plain(found)

    def _summed(self, ranks: Ranks, masked: Tensor, follows: Tensor, seconds: float) -> dict[str, Any]:
        """Sum the gradients over the ranks; returns the losses of all. seconds: that this rank took for its own."""
        found = ranks.exchange([float(masked), float(follows), seconds], "the losses")
        ranks.seconds = [row[2] for row in found]
        ranks.sum_gradients([p for p in self.network.parameters() if p.requires_grad], "the gradients")
        figures = self._figures(*(sum(row[n] for row in found) for n in (0, 1)))
        return figures | self._slow.look(ranks.seconds)

    def _figures(self, masked: Any, follows: Any) -> dict[str, Any]:
        return {"loss": masked + follows, "mlm_loss": masked, **({"nsp_loss": follows} if self._pairs else {})}

    def _hidden(self, batch: Batch, device: torch.device, read: Callable[..., Tensor]) -> tuple[Tensor, Batch]:
        moved = {name: x.to(device) for name, x in batch.items()}
        return read(moved["input_ids"], token_type_ids=moved["token_type_ids"]), moved

    @torch.no_grad()
    def evaluate(self, batch_size: int, config: TrainConfig, autocast: Autocast, device: torch.device) -> Evaluation:
        """Evaluate on the same rows, with the same masks, each time; ranks take them in turns, to the same bits."""
        training = self.network.training
        self.network.eval()
        try:
            parts = [self._sums(first, rows, autocast, device) for first, rows in self._pieces(batch_size, config)]
        finally:
            self.network.train(training)
        if self.ranks is not None:
            everywhere = self.ranks.sum([value for part in parts for value in part], "the evaluation")
            parts = [everywhere[n : n + 6] for n in range(0, len(everywhere), 6)]
        sums = sum(map(np.array, parts), np.zeros(6))
        masked, right = sums[:2] / sums[2]
        figures = {"val_mlm_loss": masked, "val_mlm_accuracy": right}
        if not self._pairs:
            return Evaluation(float(masked), figures=_plain(figures))
        follows, right = sums[3:5] / sums[5]
        return Evaluation(
            float(masked + follows), figures=_plain({**figures, "val_nsp_loss": follows, "val_nsp_accuracy": right})
        )

    def _evaluated_rows(self, batch_size: int, config: TrainConfig) -> int:
        every = self._held_out.rows_per_epoch
        return every if config.eval_batches == 0 else min(every, config.eval_batches * batch_size)

    def _pieces(self, batch_size: int, config: TrainConfig) -> Iterator[tuple[int, int]]:
        """First row and number of rows of each forward pass of an evaluation; 0 where it is that of another rank."""
        rows = self._evaluated_rows(batch_size, config)
        each = max(1, min(batch_size, _LOGITS // (self.block_size * self.network.config.vocab_size)))
        for n, first in enumerate(range(0, rows, each)):
            own = self.ranks is None or n % self.ranks.shares == self.ranks.share
            yield first, min(each, rows - first) if own else 0

    def _sums(self, first: int, rows: int, autocast: Autocast, device: torch.device) -> list[float]:
        """Of the masked tokens and of the pairs of some rows: loss, right, number."""
        found = [0.0] * 6
        if rows:
            with autocast():
                hidden, moved = self._hidden(self._held_out.batch_from(first, rows), device, self.network.hidden_states)
                chosen = moved["labels"] != _IGNORED
                found[:3] = _judged(self.network.logits_of(hidden[chosen]), moved["labels"][chosen])
                if self._pairs:
                    found[3:] = _judged(self.network.next_sentence_logits(hidden), moved["next_sentence_label"])
        return found

    def evaluated_tokens(self, batch_size: int, config: TrainConfig) -> float:
        return self._evaluated_rows(batch_size, config) * self.block_size

    def flops_per_token(self) -> float:
        """FLOPs of a step per token; the head's count for the masked tokens alone."""
        config = self.network.config
        head = config.n_embd * (config.vocab_size + config.n_embd)
        chosen = self.sampler.probability
        return self.network.flops_per_token(self.block_size) - 6 * head * (1 - chosen)

    def restore(self, folder: Path) -> None:
        self.network.load_state_dict(BERT.from_pretrained(folder, dtype=torch.float32).state_dict())

    def writer(self, copies: Copies | None) -> Callable[[Path], None]:
        export.check(self.network, patched=True)  # a probe in forward must not cost a run its checkpoints
        described = export.described(self.network)
        return described.write if copies is None else described.copied(copies.take).write

    def write(self, folder: Path) -> None:
        self.writer(None)(folder)


def _judged(logits: Tensor, wanted: Tensor) -> tuple[float, int, int]:
    """The summed loss, how many are right, and how many there are."""
    if not len(wanted):
        return 0.0, 0, 0
    loss = ops.cross_entropy(logits, wanted, reduction="sum")
    return float(loss), int((logits.argmax(-1) == wanted).sum()), len(wanted)


def _plain(figures: dict[str, Any]) -> dict[str, float]:
    return {name: float(x) for name, x in figures.items()}
