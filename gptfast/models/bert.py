"""BERT: the network without a causal mask, with the checkpoints of transformers' BERT and the filling of masks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from gptfast.config import GPTConfig
from gptfast.metadata import Metadata
from gptfast.models import export, pretrained
from gptfast.models.fill_mask import fill_mask
from gptfast.models.gpt import GPT
from gptfast.models.locate import resolve
from gptfast.models.stored import StoredModel
from gptfast.nn.transformer import Transformer
from gptfast.tokenizer import Tokenizer, has_tokenizer, load_tokenizer


class BERT(Transformer):
    """A BERT (Devlin et al., arXiv 1810.04805); `forward`, training and checkpoints are those of `gptfast.nn.Transformer`.

    model(ids, attention_mask=..., token_type_ids=...) returns the logits of the masked-language-model head, (B, T, V). With
    labels, (B, T) the right token of each position or -100, it returns (logits, loss); next_sentence_label adds the loss of
    next sentences. `hidden_states` returns the input of the heads, which `pooled` and `next_sentence_logits` take.

    Args:
        config: with causal=False, such as `GPTConfig.preset("bert-base")`.
    Raises:
        ValueError: a causal config.
    """

    def __init__(self, config: GPTConfig) -> None:
        if isinstance(config, GPTConfig) and config.causal:
            raise ValueError(
                "BERT: the config has causal=True, which is a GPT; use gptfast.GPT, or a config with causal=False such as "
                "GPTConfig.preset('bert-base')"
            )
        super().__init__(config)
        self.metadata = Metadata()
        self.folder = ""  # of the checkpoint, which may have the tokenizer

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        revision: str | None = None,
        **config_overrides: Any,
    ) -> BERT:
        """Load transformers' BertForPreTraining, BertForMaskedLM or BertModel, or what `save_pretrained` wrote.

        A BertForSequenceClassification is read by `gptfast.finetuning.TaskModel.from_pretrained`.

        Args:
            path: a folder with config.json and safetensors (or an older pytorch_model.bin), or a hub id.
            dtype: of the weights; None: as stored.
            revision: as in `GPT.from_pretrained`.
            config_overrides: fields of `GPTConfig` to change, such as dropout=0.0.
        Returns:
            The model in evaluation mode, with the heads that the checkpoint has.
        Raises:
            OSError, ValueError, ImportError: as `GPT.from_pretrained`.
        """
        folder = resolve(path, revision)
        model = pretrained.load(cls, folder, dtype, config_overrides)
        model.folder = str(folder)
        return model

    def fill_mask(
        self,
        texts: str | Sequence[str],
        *,
        top_k: int = 5,
        targets: str | Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> Any:
        """The tokens that most probably stand behind each [MASK] of a text, as transformers' fill-mask pipeline gives them.

        Args:
            texts: one text or several, each with one [MASK] or more.
            top_k: number of answers for each mask, >= 1.
            targets: the only words to answer with, each of one token; scores are still probabilities among all tokens. None: all.
            tokenizer: a WordPiece; None: that of the checkpoint folder.
        Returns:
            Of one text with one mask a list of {"score", "token", "token_str", "sequence"}, the most probable first: probability,
            id, text of the token, and the text with it. Of several masks a list of such lists, each with the other masks in
            its sequences. Of several texts a list of these.
        Raises:
            TypeError, ValueError: a text without a mask or longer than block_size, a target of several tokens, a model without
                the head, or no tokenizer.
        """
        if tokenizer is None:
            if not self.folder or not has_tokenizer(self.folder):
                raise ValueError("fill_mask: the model was not loaded from a folder with a tokenizer; pass tokenizer=")
            tokenizer = load_tokenizer(self.folder)
        return fill_mask(self, texts, tokenizer, top_k, targets)

    def save_pretrained(self, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights to a folder that transformers reads with the same logits.

        Args:
            path: a folder, made if missing; its other files stay. A failure leaves what was there.
            max_shard_size: bytes, or text such as "500MB" (10**6 each); larger weights become several files with an index.
        Raises:
            OSError: it cannot be written (disk full, no permission).
            ValueError: a wrong max_shard_size, or the model's modules are not what its config says.
        """
        export.save(self, path, max_shard_size)


def load_model(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, revision: str | None = None, **options: Any
) -> GPT | BERT:
    """The GPT or BERT of a checkpoint; arguments as in its `from_pretrained`."""
    folder = resolve(path, revision)
    kind = GPT if StoredModel(folder).config.causal else BERT
    return kind.from_pretrained(folder, dtype=dtype, **options)
