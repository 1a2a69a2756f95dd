"""Rows that are packed of several texts: none sees another."""

from __future__ import annotations

import pytest
import torch

from gptfast import GPT, GPTConfig

V = 61
LENGTHS = (7, 1, 24, 12)
SHAPES = {
    "gpt2": {},
    "gpt1": {"norm_position": "post", "final_norm": False},
    "banded": {"attention_pattern": "alternating", "window": 5},
    "sinusoidal": {"position_embedding": "sinusoidal"},
}


def model(**options: object) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "vocab_size": V, "dropout": 0.0}
    net = GPT(GPTConfig(**{**sizes, **options}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return net


def texts() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)
    parts = [torch.randint(V, (1, n)) for n in LENGTHS]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return parts, {"ids": torch.cat(parts, 1), "cu_seqlens": ends}


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_single_texts(shape):
    net = model(**SHAPES[shape]).eval()
    parts, packed = texts()
    wanted = torch.cat([net(part) for part in parts], 1)
    torch.testing.assert_close(net(**packed), wanted, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_is_the_sum_of_the_single_losses(shape):
    net = model(**SHAPES[shape]).train()
    parts, packed = texts()
    parts = [part for part in parts if part.shape[1] > 1]
    count = sum(part.shape[1] - 1 for part in parts)
    single = sum(net(part, labels=part)[1] * (part.shape[1] - 1) for part in parts)
    total = net(**packed, labels=packed["ids"])[1] * count
    torch.testing.assert_close(total, single, atol=0, rtol=1e-6)
    found, wanted = (torch.autograd.grad(loss, list(net.parameters())) for loss in (total, single))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)  # sums over 41 positions with losses of about 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"cu_seqlens": torch.tensor([0, 7, 44])}, "has a text of 37 tokens but block_size is 24"),
        ({"cu_seqlens": torch.tensor([0, 20, 43])}, "rise from 0 to T = 44"),
        ({"cu_seqlens": torch.tensor([0, 20, 20, 44])}, "rise from 0 to T = 44"),
        ({"cu_seqlens": torch.tensor([0.0, 44.0])}, "cu_seqlens has dtype torch.float32"),
        ({"cu_seqlens": [0, 44]}, "cu_seqlens is a list"),
        ({"ids": torch.zeros(2, 44, dtype=torch.int64)}, r"and ids \(2, 44\); expected"),
        ({"attention_mask": torch.ones(1, 44)}, "cu_seqlens with attention_mask"),
        ({"last_only": True}, "cu_seqlens with last_only"),
    ],
)
def test_refused(change, text):
    with pytest.raises((TypeError, ValueError), match=text):
        model().eval()(**{**texts()[1], **change})
