"""What a model without a causal mask, as BERT, reads beside the ids.  B rows, T positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from gptfast.nn.inputs import REFUSED, Padding, check_ids, refuse

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


class Beside(NamedTuple):
    """What a model without a causal mask reads beside the tokens of compacted rows.

    types: (B, T) int64, those of the tokens. positions: (B, T), the columns in which they were. lengths: (B,) int32, the tokens
    of each row. None: type 0; 0 to T - 1; all T.
    """

    types: Tensor | None
    positions: Tensor | None = None
    lengths: Tensor | None = None

    @classmethod
    def of(cls, config: GPTConfig, tokens: Tensor, types: Any, padding: Padding | None) -> Beside | None:
        """What there is in this call. Raises TypeError or ValueError for token types that the model does not have."""
        if config.type_vocab_size is None:
            refuse("GPT", {"token_type_ids": types}, REFUSED)
            types = None
        elif types is not None:
            check_ids("token_type_ids", types, (torch.int64, torch.int32), config.type_vocab_size)
            if types.shape != tokens.shape[:2]:
                raise ValueError(
                    f"GPT: token_type_ids has shape {tuple(types.shape)} and ids {tuple(tokens.shape[:2])}; expected equal shapes"
                )
        if config.causal or (types is None and padding is None):
            return None
        if padding is None:
            return cls(types)
        return cls(
            None if types is None else padding.compact(types), padding.order, padding.counts.sum(1, dtype=torch.int32)
        )


def check_next_sentence(config: GPTConfig, labels: Any, targets: Any, rows: int) -> None:
    """Raise TypeError or ValueError for labels of next sentences that do not fit the model or the call."""
    if labels is None:
        return
    if not config.next_sentence_head or targets is None:
        missing = "targets or labels beside it" if targets is None else "a model with next_sentence_head"
        raise ValueError(f"GPT: next_sentence_label was given without {missing}; expected both")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.shape != (rows,):
        got = f"{tuple(labels.shape)}, {labels.dtype}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"GPT: next_sentence_label is {got}; expected ({rows},) int64, 0 or 1")
