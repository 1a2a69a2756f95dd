"""What callers of transformers and nanoGPT bring: attention_mask, batches of a tokenizer, labels, -1, names of arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import gptfast
from gptfast.generation import generate, stream
from tests.support.generation_pairs import make_pair

transformers = pytest.importorskip("transformers")

V, BLOCK, PAD, END = 61, 48, 60, 59
PROMPTS = [[1, 2, 3], [7], [9, 8, 7, 6, 5, 4, 3]]
SIDES = ["left", "right"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return make_pair("gpt2", tmp_path_factory.mktemp("gpt2"), V, BLOCK)


def padded(side: str, pad: int = PAD) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, attention_mask) of PROMPTS."""
    longest = max(map(len, PROMPTS))
    rows, masks = [], []
    for prompt in PROMPTS:
        fill = longest - len(prompt)
        left, right = (fill, 0) if side == "left" else (0, fill)
        rows.append([pad] * left + prompt + [pad] * right)
        masks.append([0] * left + [1] * len(prompt) + [0] * right)
    return torch.tensor(rows), torch.tensor(masks)


def batch_encoding(ids, mask, **more) -> transformers.BatchEncoding:
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask, **more})


# ---- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
def test_logits_of_padded_rows_equal_transformers_and_the_rows_alone(pair, side):
    theirs, model = pair
    ids, mask = padded(side)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # which transformers computes in generate, not in its forward
    with torch.no_grad():
        expected = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        logits = model(input_ids=ids, attention_mask=mask)
        last = model(ids, attention_mask=mask, last_only=True)
        for n, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(logits[n][mask[n] == 1], expected[n][mask[n] == 1], rtol=1e-4, atol=1e-4)
            alone = model(torch.tensor([prompt]))[0]
            torch.testing.assert_close(logits[n][mask[n] == 1], alone, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(last[n], alone[-1], rtol=1e-5, atol=1e-5)


def test_padding_of_any_value_and_place_leaves_the_rest_as_it_is(pair):
    """Ids outside the vocabulary too, and holes: what is hidden is not there."""
    model, row = pair[1], [3, 1, 4, 1, 5, 9]
    ids = torch.tensor([[V + 9, 3, 1, -1, 4, 1, -100, 5, 9, 10**6]])
    with torch.no_grad():
        alone = model(torch.tensor([row]))[0]
        for dtype in (torch.int64, torch.bool, torch.float32):
            mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 1, 1, 0]], dtype=dtype)
            torch.testing.assert_close(model(ids, attention_mask=mask)[0][mask[0] != 0], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "shape", [{"attention_pattern": "alternating", "window": 3}, {"position_embedding": "sinusoidal"}]
)
def test_every_kind_of_model_takes_padding(shape):
    config = gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=V, dropout=0.0, **shape)
    model = gptfast.GPT(config).eval()
    ids, mask = padded("left")
    with torch.no_grad():
        logits = model(ids, attention_mask=mask)
        for n, prompt in enumerate(PROMPTS):
            torch.testing.assert_close(
                logits[n, -len(prompt) :], model(torch.tensor([prompt]))[0], rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("side", SIDES)
def test_a_collators_batch_trains_as_in_transformers(pair, side):
    """model(**batch) with labels: loss and gradients; in training mode too, where the head and the loss are one op."""
    theirs, model = pair
    ids, mask = padded(side)
    labels = ids.masked_fill(mask == 0, -100)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    theirs_out = theirs(input_ids=ids, attention_mask=mask, position_ids=positions, labels=labels)
    expected = theirs_out.loss
    if side == "left":  # there transformers counts what the last padding says of the first token; we do not
        wanted = labels[:, 1:].masked_fill(mask[:, :-1] == 0, -100)
        expected = F.cross_entropy(theirs_out.logits[:, :-1].flatten(0, 1), wanted.flatten())
    theirs_grad = torch.autograd.grad(expected, theirs.transformer.wte.weight)[0]
    logits, loss = model(**batch_encoding(ids, mask, labels=labels))
    assert logits.shape == (*ids.shape, V)
    grad = torch.autograd.grad(loss, model.wte.weight)[0]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, theirs_grad, rtol=1e-3, atol=1e-5)
    still = gptfast.GPT(model.config.with_dropout(0.0)).train()
    still.load_state_dict(model.state_dict())
    none, trained = still(batch_encoding(ids, mask), labels=labels)
    assert none is None
    torch.testing.assert_close(trained, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(trained, still.wte.weight)[0], theirs_grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_targets_of_nanogpt(training):
    config = gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=V, dropout=0.0)
    model = gptfast.GPT(config).train(training)
    ids, targets = torch.randint(V, (2, 8)), torch.randint(V, (2, 8))
    targets[0, :5] = -100
    expected, other = model(ids, targets)[1], targets.masked_fill(targets == -100, -1)
    assert torch.equal(model(ids, other, ignore_index=-1)[1], expected)
    with pytest.raises(
        ValueError, match=r"targets holds -1; expected .* or -100 where .* - ignore_index=-1 says that -1"
    ):
        model(ids, other)
    with pytest.raises(ValueError, match=r"targets holds -100; expected .* or -1 where"):
        model(ids, targets, ignore_index=-1)


@pytest.mark.slow
def test_the_masked_model_compiles_whole(pair):
    model = pair[1]
    ids, mask = padded("left")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids, attention_mask=mask), model(ids, attention_mask=mask))


IDS = torch.tensor([[1, 2, 3]])


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attention_mask": [[1, 1, 1]]}, TypeError, r"attention_mask is a list; expected a \(B, T\) tensor"),
        ({"attention_mask": IDS[:, :2]}, ValueError, r"attention_mask has shape \(1, 2\) and ids \(1, 3\)"),
        (
            {"attention_mask": torch.ones(1, 1, 3, 3)},
            ValueError,
            "expected equal shapes, .* attention is causal by itself",
        ),
        ({"token_type_ids": IDS}, TypeError, "GPT: token_type_ids is not taken; a GPT knows one type of token"),
        ({"position_ids": IDS}, TypeError, "position_ids is not taken; positions follow from attention_mask"),
        (
            {"past_key_values": ()},
            TypeError,
            r"past_key_values is not taken; cache=gptfast.models.KVCache\(model.config",
        ),
        ({"use_cache": True}, TypeError, "use_cache is not taken"),
        ({"output_hidden_states": True}, TypeError, r"register a forward hook on model.h\[n\]"),
        ({"temperature": 1.0}, TypeError, "GPT: unexpected argument 'temperature'"),
        ({"input_ids": IDS}, TypeError, "GPT: ids and input_ids were both given"),
        ({"targets": IDS, "labels": IDS}, TypeError, "GPT: targets and labels were both given"),
        ({"labels": IDS[:, 1:]}, ValueError, r"targets has shape \(1, 2\) and ids \(1, 3\)"),
    ],
)
def test_what_the_model_does_not_take_is_refused_by_name(pair, options, error, match):
    with pytest.raises(error, match=match):
        pair[1](IDS, **options)


def test_a_cache_and_a_mask_are_refused_together(pair):
    with pytest.raises(ValueError, match=r"attention_mask with a cache; .* or call generate"):
        pair[1](IDS, attention_mask=torch.ones_like(IDS), cache=gptfast.models.KVCache(pair[1].config, 1))
    assert pair[1](IDS, use_cache=False, return_dict=None).shape == (1, 3, V), "what asks for nothing is let through"


# ---- generation -----------------------------------------------------------------------------------------------------

METHODS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "penalty": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},  # not in the engine's own loop
}


@pytest.mark.usefixtures("writer")
@pytest.mark.parametrize("method", METHODS)
def test_left_padding_returns_what_transformers_returns(pair, method):
    """But for the penalties, which in transformers count the padding."""
    theirs, model = pair
    ids, mask = padded("left")
    options = {"max_new_tokens": 9, **METHODS[method]}
    rows = model.generate(ids, attention_mask=mask, pad_token_id=PAD, eos_token_id=END, **options)
    if method != "penalty":
        told = {"pad_token_id": PAD, "eos_token_id": END, "do_sample": False}
        assert torch.equal(rows, theirs.generate(ids, attention_mask=mask, **told, **options))
    alone = [model.generate([prompt], eos_token_id=END, **options)[0][len(prompt) :] for prompt in PROMPTS]
    longest = max(map(len, alone))
    assert rows[:, : ids.shape[1]].equal(ids)
    assert rows[:, ids.shape[1] :].tolist() == [row + [PAD] * (longest - len(row)) for row in alone]


@pytest.mark.usefixtures("writer")
@pytest.mark.parametrize("side", SIDES)
def test_prompts_in_every_form_of_transformers(pair, side):
    model = pair[1]
    ids, mask = padded(side)
    options = {"max_new_tokens": 5, "temperature": 0.9, "seed": 3}
    new = [row[len(p) :] for row, p in zip(model.generate(PROMPTS, **options), PROMPTS, strict=True)]
    expected = torch.cat([ids, torch.tensor(new)], 1)
    batch = batch_encoding(ids, mask)
    calls = {
        "a batch": lambda: model.generate(batch, **options),
        "a batch expanded": lambda: model.generate(**batch, **options),
        "a dict": lambda: model.generate(dict(batch), **options),
        "input_ids": lambda: model.generate(input_ids=ids, attention_mask=mask, **options),
        "inputs": lambda: model.generate(inputs=ids, attention_mask=mask.bool(), **options),
        "the function": lambda: generate(model, batch, **options),
        "the engine": lambda: model.compile_for_inference("float32").generate(**batch, **options),
        "use_cache": lambda: model.generate(batch, use_cache=True, output_scores=False, **options),
        "with log-probabilities": lambda: model.generate(batch, return_logprobs=True, **options).sequences,
        "pad_token_id alone": lambda: model.generate(ids, pad_token_id=PAD, eos_token_id=END, **options),
    }
    for name, call in calls.items():
        assert torch.equal(call(), expected), name
    assert model.generate(batch_encoding(ids.tolist(), mask.tolist()), **options) == expected.tolist(), "lists"
    assert model.generate(batch_encoding(ids.numpy(), mask.numpy()), **options) == expected.tolist(), "arrays"
    steps = [step.tokens for step in stream(model, batch, **options)]
    assert [list(row) for row in zip(*steps, strict=True)] == new
    one = model.generate(batch_encoding(PROMPTS[0], [1, 1, 1]), **options)
    assert one == [PROMPTS[0] + new[0]], "one text, as tokenizer(text) gives it"


def test_an_end_token_at_the_ends_of_a_prompt_is_no_padding(pair):
    """As in transformers: GPT-2's pad token is usually its end token."""
    ids = torch.tensor([[END, 1, 2]])
    rows = pair[1].generate(ids, max_new_tokens=4, pad_token_id=END, eos_token_id=END)
    expected = pair[0].generate(ids, max_new_tokens=4, pad_token_id=END, eos_token_id=END, do_sample=False)
    assert torch.equal(rows, expected)


def test_the_checkpoints_pad_token_fills_ended_rows(tmp_path):
    theirs, _ = make_pair("gpt2", tmp_path, V, BLOCK)
    ids = torch.tensor([[1, 2, 3], [40, 50, 60]])
    free = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    end = next(token for token in free[0, 3:].tolist() if token not in free[1, 3:])
    theirs.generation_config.eos_token_id, theirs.generation_config.pad_token_id = end, PAD - 1
    theirs.save_pretrained(tmp_path)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    assert PAD - 1 in expected
    assert torch.equal(gptfast.GPT.from_pretrained(tmp_path).eval().generate(ids, max_new_tokens=6), expected)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "attention_mask hides all of prompt 0"),
        ({"attention_mask": torch.ones(1, 2)}, ValueError, r"attention_mask has rows of \[2\] and ids of \[3\]"),
        ({"attention_mask": torch.full((1, 3), 2)}, ValueError, "attention_mask holds 2 in row 0; expected 1, or 0"),
        ({"attention_mask": torch.ones(1, 1, 3, 3)}, TypeError, "expected .B, T. of 1, or 0 for padding"),
        ({"attention_mask": "111"}, TypeError, "attention_mask is a str"),
        ({"attention_mask": [[1, 1, None]]}, ValueError, "attention_mask holds None in row 0"),
        ({"input_ids": IDS}, TypeError, "generate: ids and input_ids were both given"),
        ({"token_type_ids": IDS}, TypeError, "generate: token_type_ids is not taken; a GPT knows one type"),
        ({"return_dict_in_generate": True}, TypeError, "return_dict_in_generate is not taken; return_logprobs=True"),
        ({"output_scores": True}, TypeError, "output_scores is not taken; return_logprobs=True"),
        ({"past_key_values": ()}, TypeError, "past_key_values is not taken; a call keeps keys and values by itself"),
        ({"generation_config": object()}, TypeError, "generation_config is not taken; give its settings as options"),
        ({"stopping_criteria": []}, TypeError, "stopping_criteria is not taken; stop_strings and eos_token_id end"),
        ({"max_tokens": 5}, TypeError, "max_tokens is not taken; here it is called max_new_tokens"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id is -1; expected at least 0"),
        ({"pad_token_id": "x"}, TypeError, "pad_token_id is 'x'; expected an int"),
    ],
)
def test_what_generate_does_not_take_is_refused_by_name(pair, options, error, match):
    for call in (
        pair[1].generate,
        lambda *a, **o: generate(pair[1], *a, **o),
        lambda *a, **o: stream(pair[1], *a, **o),
    ):
        with pytest.raises(error, match=match):
            call(IDS, **options)


def test_a_batch_without_ids_or_with_two_masks_is_refused(pair):
    with pytest.raises(TypeError, match="ids is a BatchEncoding without input_ids"):
        pair[1].generate(transformers.BatchEncoding({"attention_mask": IDS}))
    with pytest.raises(TypeError, match="attention_mask was given twice"):
        pair[1].generate(batch_encoding(IDS, IDS), attention_mask=IDS)
    with pytest.raises(TypeError, match="ids is a NoneType; expected"):
        pair[1].generate(max_new_tokens=2)
