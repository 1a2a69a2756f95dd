"""Vectors before prompts in `generate`: in torch, in the native engine, and as transformers has them."""

from __future__ import annotations

import pytest
import torch

from gptfast.engine import engine_for
from gptfast.generation import TorchRunner, generate
from gptfast.models import GPT, GPTConfig

C, V = 32, 61
ROTARY = {"position_embedding": "rotary", "n_kv_head": 2, "norm": "rms_norm"}
PROMPTS = [[3, 1, 4], [1, 5]]


def make(**options) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": C, "block_size": 24, "vocab_size": V, "dropout": 0.0}
    model = GPT(GPTConfig(**{**sizes, "tie_weights": False, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def prefixes(*lengths: int) -> list[torch.Tensor]:
    return [torch.randn(n, C, generator=torch.Generator().manual_seed(n)) for n in lengths]


def greedy(model: GPT, prompt: list[int], prefix: torch.Tensor, count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens]), prefix_embeds=prefix[None], last_only=True)
        tokens.append(int(logits.argmax()))
    return tokens


@pytest.mark.parametrize(
    "options", [{}, {"position_embedding": "sinusoidal"}, ROTARY], ids=["learned", "sinusoidal", "rotary"]
)
@pytest.mark.parametrize("where", ["torch", "engine"])
def test_the_texts_are_those_of_the_whole_forward(options: dict, where: str):
    model = make(**options)
    assert engine_for(model) is not None
    runs: object = model if where == "engine" else TorchRunner(model, 4, 24)
    before = prefixes(5, 9)
    with torch.no_grad():
        wanted = [greedy(model, prompt, own, 8) for prompt, own in zip(PROMPTS, before, strict=True)]
    assert generate(runs, PROMPTS, prefix_embeds=before, max_new_tokens=8) == wanted
    again = generate(runs, PROMPTS, prefix_embeds=before, max_new_tokens=8, num_return_sequences=2, temperature=0.0)
    assert again == [text for text in wanted for _ in range(2)]
    assert generate(runs, PROMPTS, max_new_tokens=8) != wanted
    ids = torch.tensor([[3, 1, 4]])
    assert generate(runs, ids, prefix_embeds=before[0][None], max_new_tokens=8).tolist() == [wanted[0]]


def test_as_transformers_has_them():
    transformers = pytest.importorskip("transformers")
    model = make(tie_weights=True)
    config = transformers.GPT2Config(
        **{"n_layer": 2, "n_head": 4, "n_embd": C, "n_positions": 24, "vocab_size": V},
        **{"bos_token_id": None, "eos_token_id": None},
    )
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ends = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    state = {name: x.t() if name.endswith(ends) else x for name, x in model.state_dict().items()}
    theirs.transformer.load_state_dict({k: v for k, v in state.items() if k != "lm_head.weight"}, strict=False)
    ids, (prefix,) = torch.tensor([PROMPTS[0]]), prefixes(6)
    embeds = torch.cat((prefix[None], theirs.transformer.wte(ids)), 1)
    wanted = theirs.generate(
        inputs_embeds=embeds, attention_mask=torch.ones(1, 9), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert model.generate(ids, prefix_embeds=prefix[None], max_new_tokens=8)[:, 3:].tolist() == wanted.tolist()


BAD = {
    "wide": ({"prefix_embeds": torch.ones(2, 3, 48)}, ValueError, r"prompt 0 has shape \(3, 48\); expected \(n, 32\)"),
    "ids": ({"prefix_embeds": torch.ones(2, 3, C, dtype=torch.int64)}, TypeError, "is no tensor of floats"),
    "rows": ({"prefix_embeds": torch.ones(1, 3, C)}, ValueError, "prefix_embeds has 1 entries for 2 prompts"),
    "long": (
        {"prefix_embeds": torch.ones(2, 14, C), "max_new_tokens": 8},
        *(
            ValueError,
            "3 tokens and max_new_tokens is 8, together 11, but block_size is 24, of which prefix_embeds take 14",
        ),
    ),
    "longer than all": (
        {"prefix_embeds": torch.ones(2, 30, C)},
        ValueError,
        "block_size is 24, of which prefix_embeds take 30",
    ),
    "beams": ({"prefix_embeds": torch.ones(2, 3, C), "num_beams": 2}, ValueError, "prefix_embeds with num_beams"),
    "slide": (
        {"prefix_embeds": torch.ones(2, 3, C), "overflow": "slide"},
        *(ValueError, "prefix_embeds with overflow='slide'; leave one out"),
    ),
    "alone": ({"inputs_embeds": torch.ones(2, 3, C)}, TypeError, "and the vectors as prefix_embeds"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case: str):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make().generate(PROMPTS, **options)
