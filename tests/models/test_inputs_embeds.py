"""Vectors in the places of token embeddings, and before them: forward, loss and gradients, padding, caches."""

from __future__ import annotations

import pytest
import torch

from gptfast.models import GPT, GPTConfig, KVCache

C, V = 32, 61
POSITIONS = ("learned", "sinusoidal", "rotary")


def make(positions: str = "learned", **options) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 4, "n_embd": C, "block_size": 24, "vocab_size": V, "dropout": 0.0}
    return GPT(GPTConfig(**{**sizes, "position_embedding": positions, **options})).eval()


def draws(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


IDS = torch.randint(V, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("positions", POSITIONS)
def test_embeddings_of_the_ids_give_the_logits_of_the_ids(positions: str):
    model = make(positions)
    vectors = model.wte(IDS)
    assert torch.equal(model(inputs_embeds=vectors), model(IDS))
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    assert torch.equal(
        model(inputs_embeds=vectors, attention_mask=mask)[mask.bool()], model(IDS, attention_mask=mask)[mask.bool()]
    )
    packed = {"cu_seqlens": torch.tensor([0, 10, 20])}
    assert torch.equal(model(inputs_embeds=vectors.view(1, 20, C), **packed), model(IDS.view(1, 20), **packed))
    one, two = KVCache(model.config, 2), KVCache(model.config, 2)
    for part, ids in zip(vectors.split((7, 3), 1), IDS.split((7, 3), 1), strict=True):
        assert torch.equal(model(inputs_embeds=part, cache=one, last_only=True), model(ids, cache=two, last_only=True))


@pytest.mark.parametrize("positions", POSITIONS)
def test_a_prefix_lies_before_the_tokens_and_takes_positions(positions: str):
    model, prefix = make(positions, n_kv_head=2), draws(2, 5, C)
    whole = model(inputs_embeds=torch.cat((prefix, model.wte(IDS)), 1))
    assert torch.equal(model(IDS, prefix_embeds=prefix), whole[:, 5:])
    assert torch.equal(model(IDS, prefix_embeds=prefix, last_only=True), whole[:, -1])
    cache = KVCache(model.config, 2)
    first = model(IDS[:, :4], prefix_embeds=prefix, cache=cache)
    rest = model(IDS[:, 4:], cache=cache)
    assert cache.lengths.tolist() == [15, 15]
    torch.testing.assert_close(torch.cat((first, rest), 1), whole[:, 5:], rtol=1e-5, atol=1e-5)
    mask = torch.ones_like(IDS)
    mask[1, :3] = 0
    padded = model(IDS, prefix_embeds=prefix, attention_mask=mask)
    alone = model(IDS[1:, 3:], prefix_embeds=prefix[1:])
    torch.testing.assert_close(padded[1:, 3:], alone, rtol=1e-5, atol=1e-5)


def test_losses_and_gradients_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **{"n_layer": 2, "n_head": 4, "n_embd": C, "n_positions": 24, "vocab_size": V},
        **{"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None},
    )
    theirs, ours = transformers.GPT2LMHeadModel(config), make().train()
    ours_state = {k: v.t() if k.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else v for k, v in
                  ours.state_dict().items()}  # fmt: skip
    theirs.transformer.load_state_dict({k: v for k, v in ours_state.items() if k != "lm_head.weight"}, strict=False)
    prefix, before = draws(2, 5, C).requires_grad_(), draws(2, 5, C).requires_grad_()
    loss = ours(IDS, labels=IDS, prefix_embeds=prefix)[1]
    loss.backward()
    embeds = torch.cat((before, theirs.transformer.wte(IDS)), 1)
    wanted = theirs(inputs_embeds=embeds, labels=torch.nn.functional.pad(IDS, (5, 0), value=-100)).loss
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(prefix.grad, before.grad, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.wte.weight.grad, theirs.transformer.wte.weight.grad, rtol=1e-4, atol=1e-7)
    targets = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    assert ours(IDS, targets, prefix_embeds=prefix)[1] != loss  # which has no place for the first token


BAD = {
    "both": ({"input_ids": IDS, "inputs_embeds": draws(2, 10, C)}, TypeError, "ids and inputs_embeds were both given"),
    "wide": ({"inputs_embeds": draws(2, 10, 48)}, ValueError, r"shape \(2, 10, 48\); expected \(B, n, 32\)"),
    "flat": ({"inputs_embeds": draws(10, C)}, ValueError, r"inputs_embeds has shape \(10, 32\); expected"),
    "ids": ({"inputs_embeds": IDS}, TypeError, "inputs_embeds has dtype torch.int64; expected a tensor of floats"),
    "floats": (
        {"input_ids": draws(2, 10, C)},
        TypeError,
        "ids has dtype torch.float32; expected a tensor of token ids",
    ),
    "long": ({"inputs_embeds": draws(1, 25, C)}, ValueError, "25 positions but block_size is 24"),
    "wide prefix": (
        {"input_ids": IDS, "prefix_embeds": draws(2, 3, 16)},
        ValueError,
        r"prefix_embeds has .* \(B, n, 32\)",
    ),
    "long prefix": (
        {"input_ids": IDS, "prefix_embeds": draws(2, 15, C)},
        ValueError,
        "25 positions but block_size is 24",
    ),
    "rows": ({"input_ids": IDS, "prefix_embeds": draws(1, 3, C)}, ValueError, "prefix_embeds has 1 rows and ids 2"),
    "packed": (
        {"input_ids": IDS[:1], "prefix_embeds": draws(1, 3, C), "cu_seqlens": torch.tensor([0, 10])},
        *(ValueError, "prefix_embeds with cu_seqlens; put the vectors of each text into inputs_embeds"),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case: str):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        make()(**options)
