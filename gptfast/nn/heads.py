"""What of a network follows its blocks: the head, and BERT's heads.  B batch, T time, C channels, V vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast.nn.adapted import call
from gptfast.nn.linear import Linear, is_plain_linear
from gptfast.nn.norm import norm_of

if TYPE_CHECKING:
    from gptfast.config import GPTConfig
    from gptfast.nn.selection import Selection


class HeadTransform(nn.Module):
    """norm(activation(c_fc(x))), before the head of a BERT.

    Args:
        config: uses n_embd, activation and what it says of norms.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.n_embd, activation=config.activation)
        self.ln = norm_of(config)

    def forward(self, x: Tensor, adapters: Selection | None = None) -> Tensor:
        """(..., C) -> (..., C). adapters: of this forward; None: the active ones."""
        return call(self.ln, adapters, call(self.c_fc, adapters, x))


class Heads(nn.Module):
    """The part of `Transformer` behind its blocks."""

    config: GPTConfig
    wte: nn.Embedding

    def _add_heads(self, config: GPTConfig) -> None:
        C = config.n_embd
        self.lm_transform = HeadTransform(config) if config.head_transform else None
        self.lm_head = Linear(C, config.vocab_size, bias=config.head_transform)
        self.pooler = Linear(C, C, activation="tanh") if config.pooler else None
        self.next_sentence = Linear(C, 2) if config.next_sentence_head else None

    def tie_weights(self) -> None:
        """Make the head share the token embedding, if the config says so."""
        if self.config.tie_weights:
            self.lm_head.weight = self.wte.weight

    def logits_of(self, hidden: Tensor, adapters: Selection | None = None) -> Tensor:
        """The logits of hidden states: (..., C) -> (..., V). adapters: of this forward; None: the active ones."""
        if self.lm_transform is not None:
            hidden = self.lm_transform(hidden, adapters)
        logits, cap = call(self.lm_head, adapters, hidden), self.config.logit_softcap
        if cap is None:
            return logits
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (cap * torch.tanh(wide / cap)).to(logits.dtype)

    def has_plain_head(self) -> bool:
        """Whether logits are a product of hidden states with `lm_head.weight` and nothing else."""
        return is_plain_linear(self.lm_head) and self.config.logit_softcap is None and self.lm_transform is None

    def pooled(self, hidden: Tensor, adapters: Selection | None = None) -> Tensor:
        """(B, T, C) hidden states -> (B, C): the pooler's result for the first position of each row.

        Raises:
            ValueError: the model has no pooler.
        """
        if self.pooler is None:
            raise ValueError("BERT: the model has no pooler (pooler=False); load a checkpoint that has one")
        return call(self.pooler, adapters, hidden[:, 0])

    def next_sentence_logits(self, hidden: Tensor, adapters: Selection | None = None) -> Tensor:
        """(B, T, C) hidden states -> (B, 2): the second text follows the first one; it does not.

        Raises:
            ValueError: the model has no such head.
        """
        if self.next_sentence is None:
            raise ValueError(
                "BERT: the model has no head for next sentences (next_sentence_head=False); load a BertForPreTraining "
                "checkpoint, or build the model with that head"
            )
        return call(self.next_sentence, adapters, self.pooled(hidden, adapters))

    def masked_loss(self, x: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
        """The mean cross-entropy of hidden states (B, T, C) and labels (B, T): the token at each position, or ignore_index. Logits
        are computed of the positions that count."""
        return self._training_loss(x, labels.flatten(), ignore_index, None)

    def _training_loss(self, x: Tensor, targets: Tensor, ignore_index: int, adapters: Selection | None) -> Tensor:
        """The mean cross-entropy of hidden states (B, T, C) and targets (B * T,), without the logits of all of them where that can
        be."""
        if self.has_plain_head():
            return ops.linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets, ignore_index=ignore_index)
        if self.lm_transform is not None and not torch.compiler.is_compiling():  # most of a masked text does not count
            chosen = targets != ignore_index
            logits, targets = self.logits_of(x.flatten(0, 1)[chosen]), targets[chosen]
        else:
            logits = self.logits_of(x, adapters).flatten(0, 1)
        return ops.cross_entropy(logits, targets, ignore_index=ignore_index)
