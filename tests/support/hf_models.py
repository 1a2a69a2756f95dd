"""Small random models of transformers for the tests of `gptfast.integrations`."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

V, T = 97, 24
SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}
CLASSES = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
    "OpenAIGPTModel",
    "OpenAIGPTLMHeadModel",
    "OpenAIGPTDoubleHeadsModel",
    "OpenAIGPTForSequenceClassification",
)
CONFIGS = {"gpt2": "GPT2Config", "openai-gpt": "OpenAIGPTConfig"}


def hf_model(name: str = "GPT2LMHeadModel", **options: Any) -> Any:
    """A random model in evaluation mode, whose weights are large enough to tell mistakes."""
    kind = "gpt2" if name.startswith("GPT2") else "openai-gpt"
    torch.manual_seed(0)
    attention = {"attn_implementation": options.pop("attn_implementation")} if "attn_implementation" in options else {}
    config = getattr(transformers, CONFIGS[kind])(**{"vocab_size": V, "pad_token_id": 0, **SHAPES[kind], **options})
    model = getattr(transformers, name)._from_config(config, **attention)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.normal_(parameter, mean=float(parameter.mean().item() > 0.5), std=0.1)
    return model.eval()


def padded(sides: str) -> tuple[Tensor, Tensor]:
    """Ids (3, T) and their attention mask, with padding on "left", "right", "both" sides or "none"."""
    torch.manual_seed(1)
    ids, mask = torch.randint(3, V, (3, T)), torch.ones(3, T, dtype=torch.int64)
    if sides in ("left", "both"):
        mask[0, :5], mask[2, :1] = 0, 0
    if sides in ("right", "both"):
        mask[1, 17:], mask[2, -3:] = 0, 0
    return ids.masked_fill(mask == 0, 0), mask


def labels_of(ids: Tensor, mask: Tensor) -> Tensor:
    """Labels of the tokens that follow a token which is no padding."""
    before = torch.cat([mask[:, :1] * 0, mask[:, :-1]], 1)
    return ids.masked_fill((mask == 0) | (before == 0), -100)
