"""A GPT, or a BERT, with the head of a task.  R rows of token ids, T positions, C channels, N choices."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptfast import ops
from gptfast._checks import check_choice, check_real
from gptfast.finetuning import task_adapters, task_files
from gptfast.finetuning.encoder import check_head, encoded, keep_encoder
from gptfast.finetuning.examples import DELIMITERS, Encoder, Row, padded, target_of
from gptfast.finetuning.lm_loss import mean_of_rows
from gptfast.finetuning.predictions import Prediction, TaskOutput, predict
from gptfast.finetuning.special_tokens import PAD, SEP, task_tokens
from gptfast.finetuning.task_checks import check_arguments, checked_labels, checked_weights
from gptfast.finetuning.task_loss import last_positions, logits_of_examples, real_positions, rows_of_lm_loss, task_loss
from gptfast.models import BERT, GPT
from gptfast.nn import Linear
from gptfast.tokenizer import Tokenizer, load_tokenizer
from gptfast.tokenizer.base import encode_part

_HEAD = 0x7461736B68656164  # tells the head's dropout from those of the network, which have the same seed


class TaskModel(nn.Module):
    """A GPT with the head of a task, and the way from an example to its rows (`gptfast.finetuning.examples`).

    The head reads the hidden state of each row's last token, of a BERT what the pooler makes of the first. Similarity adds those
    of both orders.

    Args:
        gpt: a GPT; new delimiters give it rows in place. Or a BERT, which loses the heads of its pre-training in place.
        task: "classification", "entailment", "similarity" or, of a GPT, "choice".
        labels: names of the classes, at least two. None: entailment, neutral, contradiction for entailment; similarity and
            choice have none.
        tokenizer: of the gpt, or its name or folder; None: `forward` alone can be used.
        class_weights: weight of each class in the loss, in the order of labels or by label; None: 1.
        special_tokens: "bos", "sep", "eos", "pad" -> text or id of a token, or None for no such delimiter; what is left
            out is [BOS], [SEP], [EOS] or [PAD], of a BERT [CLS], [SEP], [SEP] or [PAD], which get ids and rows where they are new.
    Raises:
        TypeError, ValueError: unknown task, labels that do not fit it, or special tokens: see `task_tokens`.

    gpt, task, labels, tokenizer, special_tokens: as given; the tokenizer with the new tokens, special tokens as ids.
    truncated: examples encoded so far that were too long for block_size; see `Encoder`.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        gpt: GPT | BERT,
        task: str,
        labels: Sequence[str] | None = None,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        class_weights: Sequence[float] | Mapping[str, float] | Tensor | None = None,
        special_tokens: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(gpt, (GPT, BERT)):
            raise TypeError(f"TaskModel: gpt is a {type(gpt).__name__}; expected a gptfast.GPT or gptfast.BERT")
        check_choice("TaskModel", "task", task, tuple(DELIMITERS))
        if isinstance(gpt, BERT):
            if task == "choice":
                raise ValueError("TaskModel: task is 'choice', which a BERT has no head for here; use a GPT")
            keep_encoder(gpt)
        self.gpt, self.task = gpt, task
        self.labels = checked_labels(task, labels)
        weights = checked_weights(self.labels, class_weights)
        found = load_tokenizer(tokenizer) if isinstance(tokenizer, (str, os.PathLike)) else tokenizer
        self.tokenizer, self.special_tokens = task_tokens(gpt, found, DELIMITERS[task], special_tokens)
        weight = gpt.wte.weight
        place = {"device": weight.device, "dtype": weight.dtype}
        self.score = Linear(
            gpt.config.n_embd, max(len(self.labels), 1), bias=task == "choice" or isinstance(gpt, BERT), **place
        )
        nn.init.normal_(self.score.weight, std=0.02)
        if self.score.bias is not None:
            nn.init.zeros_(self.score.bias)
        weights = None if weights is None else weights.to(weight.device)
        self.register_buffer("class_weights", weights, persistent=False)
        self._encoder = Encoder(task, self.special_tokens, self._encode, self._room)
        self.train(gpt.training)

    @property
    def truncated(self) -> int:
        return self._encoder.cut

    @property
    def dropout_seed(self) -> int | None:
        """Seed of all dropouts, as `GPT.dropout_seed`."""
        return self.gpt.dropout_seed

    @dropout_seed.setter
    def dropout_seed(self, value: int | None) -> None:
        self.gpt.dropout_seed = value

    @property
    def dropout_step(self) -> int | None:
        """As `GPT.dropout_step`."""
        return self.gpt.dropout_step

    @dropout_step.setter
    def dropout_step(self, value: int | None) -> None:
        self.gpt.dropout_step = value

    def _room(self) -> int:
        """Of a row: the block_size without the virtual tokens of an active soft prompt."""
        return self.gpt.config.block_size - self.gpt.virtual_tokens()

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("TaskModel: there is no tokenizer to encode texts with; pass tokenizer=")
        return encode_part(self.tokenizer, text)

    def encode(self, example: Any) -> Row | list[Row]:
        """The token ids of an example: one row, or a list of rows for similarity (both orders) and choice.

        Args:
            example: an object with the fields of the task (label or score may be missing), or its text or texts.
        Raises:
            TypeError, ValueError: a missing field, or a value of another type; there is no tokenizer.
        """
        rows = self._encoder.rows(example)
        return rows if self.task in ("similarity", "choice") else rows[0]

    def batch(
        self, examples: Sequence[Any], *, labels: bool = True, where: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """The arguments of `forward` for examples, padded on the right.

        Args:
            examples: as `encode`.
            labels: with the labels, which each example must then have.
            where: file and line of each example, for messages.
        Raises:
            TypeError, ValueError: no examples; or see `encode` and `target_of`.
        """
        if not examples:
            raise ValueError("TaskModel: there are no examples; give at least one")
        return self.collate(*self.rows(examples, labels=labels, where=where))

    def rows(
        self, examples: Sequence[Any], *, labels: bool = True, where: Sequence[str] | None = None
    ) -> tuple[list[list[Row]], list[int | float] | None]:
        """The rows of each example, and what is to be predicted: the index of a class or choice, or a score.

        Arguments and errors: as `batch`.
        """
        places = where or [""] * len(examples)
        groups = [self._encoder.rows(example, place) for example, place in zip(examples, places, strict=True)]
        if not labels:
            return groups, None
        return groups, [target_of(self.task, x, self.labels, at) for x, at in zip(examples, places, strict=True)]

    def collate(self, groups: Sequence[Sequence[Row]], targets: Sequence[int | float] | None) -> dict[str, Tensor]:
        """The arguments of `forward` for what `rows` returns."""
        pad = self.special_tokens.get(PAD)
        ids, mask = padded(groups, pad or 0)
        one = self.task in ("classification", "entailment")
        out = {"ids": ids[:, 0] if one else ids}
        if pad is None:
            out["attention_mask"] = mask[:, 0] if one else mask
        if targets is not None:
            dtype = torch.float32 if self.task == "similarity" else torch.int64
            out["labels"] = torch.tensor(targets, dtype=dtype, device="cpu")
        return {name: x.to(self.score.weight.device) for name, x in out.items()}

    def forward(
        self,
        ids: Tensor,
        labels: Tensor | None = None,
        lm_coef: float | None = None,
        mc_token_ids: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> TaskOutput:
        """Logits and losses.

        Args:
            ids: (B, T); (B, 2, T) for similarity, both orders; (B, N, T) for choice, where a row of padding alone is no
                choice. Padding is the token "pad" of special_tokens, on the right.
            labels: (B,) index of the class or choice, int64; scores for similarity.
            lm_coef: weight of the LM loss, >= 0: the mean over the rows, for choice over the right choices' rows, of the mean
                over the row's real tokens of the cross-entropy of each token given those before it. None: 0.5, of a BERT 0, which has
                no such loss.
            mc_token_ids: position in each row that the head reads, of ids' shape without T; None: the last real token.
            attention_mask: of ids' shape, 0 for padding on either side; None: the token "pad" is padding.
            token_type_ids: of a BERT, of ids' shape; None: 1 behind the first delimiter "sep" of two texts, else 0.
        Raises:
            TypeError, ValueError: shapes, labels outside the set, or a lm_coef below 0.
        """
        lm_coef = (0.0 if isinstance(self.gpt, BERT) else 0.5) if lm_coef is None else lm_coef
        check_real("TaskModel", "lm_coef", lm_coef, "a number >= 0", lambda x: 0 <= x < float("inf"))
        check_arguments(self.task, len(self.labels), ids, labels, mc_token_ids, attention_mask)
        rows = ids.flatten(0, -2)  # R T
        mask = None if attention_mask is None else attention_mask.flatten(0, -2)
        real = self.real_tokens(rows, mask)
        step = self.gpt.dropout_step
        if isinstance(self.gpt, BERT):
            check_head(lm_coef, mc_token_ids)
            sep = None if self.task == "classification" else self.special_tokens.get(SEP)
            hidden = encoded(self.gpt, rows, real, token_type_ids, sep)
            read = self.gpt.pooled(hidden)
        else:
            hidden = self.gpt.hidden_states(rows, attention_mask=mask)  # R T C
            last = last_positions(real) if mc_token_ids is None else mc_token_ids.flatten()
            read = hidden[torch.arange(len(rows), device=rows.device), last]
        logits = self.score(self._dropped(read, step))
        logits = logits_of_examples(self.task, logits, ids, real)
        if labels is None:
            return TaskOutput(logits)
        loss = task_loss(self.task, logits, labels, self.class_weights)
        if lm_coef == 0:
            return TaskOutput(logits, loss, loss)
        lm_loss = mean_of_rows(self.gpt, *rows_of_lm_loss(self.task, hidden, rows, real, labels))
        return TaskOutput(logits, loss + lm_coef * lm_loss, loss, lm_loss)

    def real_tokens(self, rows: Tensor, mask: Tensor | None) -> Tensor:
        """Of the rows' shape, where there is no padding; arguments as `forward`'s ids and attention_mask."""
        return real_positions(rows, mask, self.special_tokens.get(PAD))

    def _dropped(self, picked: Tensor, step: int | None) -> Tensor:
        p = self.gpt.config.resid_pdrop if self.training else 0.0
        if p == 0:
            return picked
        seed = self.gpt.dropout_seed
        if seed is None or step is None:
            return ops.dropout(picked, p)
        return ops.dropout(picked, p, seed ^ _HEAD, step)

    @torch.no_grad()
    def predict(self, examples: Iterable[Any]) -> list[Prediction]:
        """The label and the probability of each, or the score, of examples; in evaluation mode, whatever the model is in.

        Args:
            examples: as `encode`.
        Returns:
            {"label", "probabilities"}: a class and {class: probability}, or the index of a choice and a list of
            probabilities. {"score"} for similarity.
        Raises:
            TypeError, ValueError: as `encode`.
        """
        return predict(self, examples)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint folder with the tokenizer: ForSequenceClassification of transformers with the same logits
        (of similarity those of each order), choice as DoubleHeadsModel. Raises OSError, ValueError as `GPT.save_pretrained`."""
        task_files.save(self, Path(path))

    def save_adapter(self, path: str | os.PathLike[str], name: str = "default") -> None:
        """Write an adapter of `gpt` in peft's format with the head and the tokenizer, without the base; as `GPT.save_adapter`."""
        task_adapters.save(self, Path(path), name)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        task: str | None = None,
        labels: Sequence[str] | None = None,
        tokenizer: Tokenizer | str | os.PathLike[str] | None = None,
        class_weights: Sequence[float] | Mapping[str, float] | Tensor | None = None,
        special_tokens: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        base: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        **config_overrides: Any,
    ) -> TaskModel:
        """Load a checkpoint or an adapter of a task, in evaluation mode, or give a language model a new head.

        Args:
            path: a checkpoint of a task, ours or transformers' (GPT2ForSequenceClassification, GPT2DoubleHeadsModel, their
                openai-gpt forms, BertForSequenceClassification); a language model as in `GPT.from_pretrained`, or a BERT;
                or the folder of a task's adapter, ours or peft's.
            task, labels, tokenizer, class_weights, special_tokens: as `TaskModel`; None: as stored. A language model needs task.
            dtype, config_overrides: of the network, as `GPT.from_pretrained`; quantize and double_quant too.
            base: of an adapter: a language model, or a checkpoint of a task, whose head is left out; None: what it names.
            revision: of a model of the hub, path or an adapter's base, as `GPT.from_pretrained`.
        Raises:
            OSError, ValueError, ImportError: as `GPT.from_pretrained` and `GPT.load_adapter`; or a head that does not fit.
        """
        given = {
            **{"task": task, "labels": labels, "tokenizer": tokenizer},
            **{"class_weights": class_weights, "special_tokens": special_tokens},
        }
        if task_adapters.is_adapter(path):
            return task_adapters.load(cls, Path(path), given, dtype, base, config_overrides, revision)
        if base is not None:
            raise ValueError(
                f"TaskModel.from_pretrained: base is {base}, but {path} is no folder of an adapter; leave it out"
            )
        return task_files.load(cls, path, given, dtype, config_overrides, revision)
