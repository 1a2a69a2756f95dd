"""Task models: rows of examples, losses, predictions, special tokens, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, mse_loss

from gptfast.finetuning import TaskModel
from tests.finetuning.models import EXAMPLES, LABELS, bpe, gpt, task_model, tokenizer


def reference(model: TaskModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, task loss and LM loss in plain torch, row by row without padding."""
    task, pad = model.task, model.special_tokens["pad"]
    scores, losses = [], []
    for rows in batch["ids"] if batch["ids"].dim() == 3 else batch["ids"][:, None]:
        for row in rows:
            row = row[row != pad]
            hidden = model.gpt.hidden_states(row[None])[0]
            scores.append(hidden[-1] @ model.score.weight.t() + (0 if model.score.bias is None else model.score.bias))
            losses.append(cross_entropy(model.gpt.lm_head(hidden[:-1]), row[1:]))
    found, lm = torch.stack(scores), torch.stack(losses)
    labels = batch["labels"]
    if task == "similarity":
        found = found.view(-1, 2).sum(1)
        return found, mse_loss(found, labels), lm.mean()
    if task == "choice":
        found = found.view(len(labels), -1)
        return found, cross_entropy(found, labels), lm.view(len(labels), -1)[range(len(labels)), labels].mean()
    return found, cross_entropy(found, labels, weight=model.class_weights), lm.mean()


@pytest.mark.parametrize("task", EXAMPLES)
def test_logits_losses_and_gradients_are_those_of_single_rows(task):
    weights = {"class_weights": [1.0, 3.0]} if task == "classification" else {}
    model = task_model(task, **weights)
    batch = model.batch(EXAMPLES[task])
    assert (batch["ids"] == model.special_tokens["pad"]).any(), "the test needs padding"
    out = model(**batch, lm_coef=0.25)
    logits, task_loss, lm_loss = reference(model, batch)
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close((out.task_loss, out.lm_loss), (task_loss, lm_loss))
    torch.testing.assert_close(out.loss, task_loss + 0.25 * lm_loss)
    found = torch.autograd.grad(out.loss, list(model.parameters()))
    wanted = torch.autograd.grad(task_loss + 0.25 * lm_loss, list(model.parameters()))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4)  # sums of some dozen rows in fp32


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("task", EXAMPLES)
def test_losses_do_not_depend_on_the_default_dtype(task, default):
    weights = {"class_weights": [1.0, 3.0]} if task == "classification" else {}
    model = task_model(task, **weights)
    wanted = model(**model.batch(EXAMPLES[task]))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        again = TaskModel(
            model.gpt, task, model.labels, model.tokenizer, special_tokens=model.special_tokens, **weights
        )
        again.load_state_dict(model.state_dict())
        found = again(**again.batch(EXAMPLES[task]))
    finally:
        torch.set_default_dtype(before)
    assert (found.loss.dtype, found.lm_loss.dtype) == (torch.float32, torch.float32)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.lm_loss, wanted.lm_loss)
    double = again.double()
    loss = double(**double.batch(EXAMPLES[task])).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss.float(), wanted.loss)


def test_without_labels_or_with_lm_coef_0():
    model = task_model("classification")
    batch = model.batch(EXAMPLES["classification"])
    out = model(batch["ids"])
    assert out.loss is out.task_loss is out.lm_loss is None
    out = model(batch["ids"], batch["labels"], lm_coef=0)
    assert out.lm_loss is None
    assert out.loss is out.task_loss


def test_class_weights_weigh_and_a_batch_without_weight_has_no_loss():
    model = task_model("classification", class_weights={"yes": 0.0, "no": 3.0})
    batch = model.batch(EXAMPLES["classification"])
    out = model(**batch, lm_coef=0)
    weights = torch.tensor([{"yes": 0.0, "no": 3.0}.get(label, 1.0) for label in model.labels])
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, batch["labels"], weights))
    none = torch.full_like(batch["labels"], model.labels.index("yes"))
    loss = model(**{**batch, "labels": none}, lm_coef=0).loss
    loss.backward()
    assert loss.item() == 0 and not model.score.weight.grad.any()


def test_mc_token_ids_name_the_token_that_is_read():
    model = task_model("choice")
    ids = model.batch(EXAMPLES["choice"])["ids"]
    places = torch.tensor([[1, 2], [3, 0]])
    hidden = model.gpt.hidden_states(ids.flatten(0, 1))[range(4), places.flatten()]
    torch.testing.assert_close(model(ids, mc_token_ids=places).logits, model.score(hidden).view(2, 2))
    whole = (ids != model.special_tokens["pad"]).sum(-1) - 1
    assert torch.equal(model(ids, mc_token_ids=whole).logits, model(ids).logits)


def test_padding_on_the_left_gives_the_same_with_a_mask():
    model = task_model("classification")
    batch = model.batch(EXAMPLES["classification"])
    real = batch["ids"] != model.special_tokens["pad"]
    order = real.long().argsort(dim=1, stable=True)
    left = model(batch["ids"].gather(1, order), batch["labels"], attention_mask=real.gather(1, order))
    right = model(batch["ids"], batch["labels"])
    torch.testing.assert_close((left.logits, left.lm_loss), (right.logits, right.lm_loss))


@pytest.mark.parametrize("kind", ["bpe", "char", "word", "openai-gpt"])
def test_rows_have_the_delimiters_of_gpt1(kind):
    def check(task: str, *texts: str) -> None:
        model = task_model(task, kind)
        t, encode = model.special_tokens, model.tokenizer.encode
        row = [t["bos"], *encode(texts[0])]
        for text in texts[1:]:
            row += [t["sep"], *encode(text)]
        encoded = model.encode(EXAMPLES[task][0])
        assert (encoded if isinstance(encoded[0], int) else encoded[0]) == [*row, t["eos"]]
        assert len(set(t.values())) == len(t)
        assert all(model.tokenizer.has_token(i) for i in t.values())
        for ids in [row, *encoded] if isinstance(encoded[0], list) else [encoded]:
            assert model.tokenizer.decode(ids)

    check("classification", "the cat sat")
    check("entailment", "the cat sat on the mat", "a cat sat")
    check("similarity", "the cat", "the dog sat")
    check("choice", "the cat", "sat on the mat")


def test_similarity_has_both_orders_and_choice_a_row_each():
    model = task_model("similarity")
    one, two = model.encode(EXAMPLES["similarity"][0])
    assert two == model.encode({"text1": "the dog sat", "text2": "the cat"})[0] != one
    swapped = model.predict([{"text1": "the dog sat", "text2": "the cat"}, EXAMPLES["similarity"][0]])
    assert swapped[0].score == pytest.approx(swapped[1].score, rel=1e-5)
    assert len(task_model("choice").encode(("the cat", ["a", "b", "c"]))) == 3


def test_new_tokens_get_rows_and_old_ones_are_named():
    used = bpe()
    model = gpt(used.vocab_size)
    before = model.wte.weight.detach().clone()
    tm = TaskModel(model, "entailment", tokenizer=used, special_tokens={"eos": "<|endoftext|>", "bos": used.eos_id})
    V = used.vocab_size
    assert tm.special_tokens == {"bos": used.eos_id, "sep": V, "eos": used.eos_id, "pad": V + 1}
    assert tm.gpt.config.vocab_size == tm.gpt.wte.num_embeddings == V + 2
    assert tm.gpt.lm_head.weight is tm.gpt.wte.weight
    assert torch.equal(tm.gpt.wte.weight[:V], before)
    assert (tm.gpt.wte.weight[V:] - before.mean(0)).abs().max() < 0.1
    assert used.vocab_size == V, "the tokenizer that was given stays as it is"
    assert tm.tokenizer.encode("[SEP]", allowed_special=["[SEP]"]) == [V]
    assert len(tm.tokenizer.encode("[SEP]")) > 1, "a text cannot inject a delimiter"


def test_a_model_that_has_generated_takes_new_tokens():
    used = bpe()
    model = gpt(used.vocab_size)
    prompt = used.encode("the cat")
    first = model.generate([prompt], max_new_tokens=4)[0]
    tm = TaskModel(model, "classification", ["a", "b"], used)
    with torch.no_grad():
        tm.gpt.wte.weight[tm.special_tokens["bos"]] = -9.0
        logits = tm.gpt(torch.tensor([first[:-1]]))
        second = tm.gpt.generate([prompt], max_new_tokens=4)[0]
    assert second[len(prompt)] == int(logits[0, len(prompt) - 1].argmax())


def test_spare_rows_and_an_untied_head():
    used = bpe()
    model = gpt(used.vocab_size + 9, tie_weights=False)
    head = model.lm_head.weight.detach().clone()
    tm = TaskModel(model, "classification", ["a", "b"], used)
    assert tm.gpt.config.vocab_size == used.vocab_size + 9
    new = slice(used.vocab_size, used.vocab_size + 3)
    assert not torch.equal(tm.gpt.lm_head.weight[new], head[new])
    assert torch.equal(tm.gpt.lm_head.weight[new.stop :], head[new.stop :])
    tm = TaskModel(gpt(5, tie_weights=False), "classification", ["a", "b"])
    assert tm.special_tokens == {"bos": 5, "eos": 6, "pad": 7}
    assert tm.gpt.lm_head.weight.shape == (8, 32)
    assert tm(torch.tensor([[5, 1, 6, 7]])).logits.shape == (1, 2)


def test_padding_is_never_the_end_token():
    used = bpe()
    for pad in ("<|endoftext|>", used.eos_id):
        given = {"eos": "<|endoftext|>", "pad": pad}
        with pytest.raises(ValueError, match="to pad and to eos"):
            TaskModel(gpt(used.vocab_size), "classification", ["a", "b"], used, special_tokens=given)


def test_predict():
    model = task_model("classification").train()
    texts = [f"{'the cat ' * (n % 5)}sat" for n in range(40)]
    found = model.predict(texts)
    assert model.training
    assert [p["label"] for p in found] == [p.label for p in found]
    for text, p in zip(texts, found, strict=True):
        assert set(p["probabilities"]) == set(LABELS["classification"])
        assert math.isclose(sum(p.probabilities.values()), 1, rel_tol=1e-9)
        assert p["probabilities"][p["label"]] == max(p["probabilities"].values())
        alone = model.predict([{"text": text}])[0]
        assert p.probabilities["yes"] == pytest.approx(alone.probabilities["yes"], abs=1e-5)
    assert model.predict([]) == []
    assert model.predict(text for text in texts) == found
    with pytest.raises(AttributeError, match="it has label, probabilities"):
        _ = found[0].score
    with pytest.raises(TypeError, match="examples is a str"):
        model.predict("the cat")


def test_predict_choices_of_different_numbers():
    model = task_model("choice")
    three = ("the cat", ["sat", "on", "the mat"])
    both = model.predict([three, ("the dog", ["sat", "sang"])])
    assert [len(p.probabilities) for p in both] == [3, 2]
    assert both[0].probabilities == pytest.approx(model.predict([three])[0].probabilities, abs=1e-6)
    assert both[0].label == max(range(3), key=both[0].probabilities.__getitem__)
    batch = model.batch([{"context": "a", "choices": ["b", "c", "d"], "label": "d"}, EXAMPLES["choice"][0]])
    assert batch["labels"].tolist() == [2, 1]
    assert model(**batch).loss.isfinite()


def test_long_rows_are_cut_and_counted():
    model = task_model("entailment", "char", block_size=16)
    t, ids = model.special_tokens, model.tokenizer.encode
    row = model.encode(("the cat sat on the mat", "the dog"))  # 13 positions for 22 + 7 characters
    assert row == [t["bos"], *ids("the cat"), t["sep"], *ids("the do"), t["eos"]]
    assert model.truncated == 1
    assert model.encode(("the", "dog")) == [t["bos"], *ids("the"), t["sep"], *ids("dog"), t["eos"]]
    assert model.truncated == 1
    with pytest.warns(UserWarning, match="1 of 2 examples are longer than block_size 16; their longest texts were cut"):
        model.predict([("the cat sat", "on the mat"), ("a", "a")])
    with pytest.raises(ValueError, match=r"a row has 4 positions .* of which the delimiters of entailment leave 1"):
        task_model("entailment", block_size=4).encode(("a", "a"))


def test_dropout_follows_seed_and_step():
    model = task_model("classification", dropout=0.5).train()
    batch = model.batch(EXAMPLES["classification"])
    model.dropout_seed, model.dropout_step = 5, 7
    first, second = model(**batch).loss, model(**batch).loss
    model.dropout_step = 7
    assert torch.equal(model(**batch).loss, first)
    assert not torch.equal(first, second)
    hidden = torch.ones(4, 32)
    assert not torch.equal(model._dropped(hidden, 7), hidden), "the head has dropout too"


@pytest.mark.parametrize(
    ("task", "example", "text"),
    [
        ("classification", {"texts": "a"}, "there is no field 'text'; expected text - it has 'texts'"),
        ("classification", {"text": 3}, "text is 3; expected a text"),
        (
            "classification",
            {"text": "a", "label": "maybe"},
            "the label 'maybe' is not in the set; expected one of 'no', 'yes'",
        ),
        ("classification", {"text": "a", "label": 2}, "the label 2 is not in the set"),
        ("classification", {"text": "a", "label": True}, "the label True is not in the set"),
        ("classification", {"text": "a"}, "there is no field 'label'"),
        ("entailment", "a", "the example is a str; expected the fields premise, hypothesis"),
        ("similarity", {"text1": "a", "text2": "a", "score": "3"}, "score is '3'; expected a finite number"),
        ("similarity", {"text1": "a", "text2": "a", "score": math.nan}, "score is nan"),
        ("choice", {"context": "a", "choices": ["a"], "label": 0}, "choices has 1 text"),
        ("choice", {"context": "a", "choices": "ab", "label": 0}, "choices is 'ab'; expected a list of texts"),
        ("choice", {"context": "a", "choices": ["a", "the"], "label": 2}, "the label 2 is not in the set"),
    ],
)
def test_bad_examples(task, example, text):
    with pytest.raises((TypeError, ValueError)) as error:
        task_model(task).batch([example])
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"task": "tagging"}, "task is 'tagging'; expected one of"),
        ({"labels": ["a"]}, "expected at least two classes"),
        ({"labels": ["a", "a"]}, "with different names"),
        ({"labels": None}, "labels is None; expected the names"),
        ({"task": "similarity"}, "but similarity has none"),
        ({"class_weights": [1.0]}, r"class_weights is [1.0]; expected one finite number"),
        ({"class_weights": {"c": 1}}, "class_weights names 'c'"),
        ({"special_tokens": {"cls": "x"}}, "special_tokens names 'cls'; expected names of bos, sep, eos, pad"),
        ({"special_tokens": {"bos": 400}}, "is 400; expected an id in [0, 300)"),
        ({"special_tokens": {"bos": 1.5}}, "expected a text, an id or None"),
        ({"special_tokens": ["<|endoftext|>"]}, "special_tokens is ['<|endoftext|>']; expected a mapping"),
    ],
)
def test_bad_arguments(arguments, text):
    with pytest.raises((TypeError, ValueError)) as error:
        TaskModel(gpt(300), **{"task": "classification", "labels": ["a", "b"], "tokenizer": bpe(), **arguments})
    assert text in str(error.value)


def test_bad_tensors():
    model = task_model("choice")
    batch = model.batch(EXAMPLES["choice"])
    for change, text in (
        ({"ids": batch["ids"][0]}, r"expected \(B, N, T\) token ids for choice"),
        ({"labels": torch.tensor([0, 2])}, r"expected int64 indices in \[0, 2\)"),
        ({"labels": torch.tensor([0])}, r"labels has shape \(1,\)"),
        ({"ids": batch["ids"].float()}, r"ids has dtype torch\.float32; expected token ids"),
        ({"mc_token_ids": torch.tensor([0])}, "mc_token_ids has shape"),
        (
            {"mc_token_ids": torch.tensor([[0, 1], [0, 99]])},
            r"mc_token_ids is \[\[0, 1\], \[0, 99\]\]; expected positions",
        ),
        ({"mc_token_ids": torch.tensor([[0, 1], [0, -1]])}, "expected positions in"),
        ({"mc_token_ids": torch.tensor([[0.0, 1], [0, 1]])}, "mc_token_ids has dtype torch.float32"),
        ({"lm_coef": -1.0}, "lm_coef is -1"),
        ({"labels": [0, 1]}, "labels is a list; expected a tensor"),
        ({"mc_token_ids": [[0, 1], [0, 1]]}, "mc_token_ids is a list; expected a tensor"),
        ({"attention_mask": batch["ids"].numpy()}, "attention_mask is a ndarray; expected a tensor"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            model(**{**batch, **change})
    with pytest.raises(ValueError, match="there is no tokenizer"):
        TaskModel(gpt(9), "classification", ["a", "b"]).predict(["a"])
    with pytest.raises(ValueError, match="the tokenizer has 290 tokens and the model 200 rows"):
        TaskModel(gpt(200), "classification", ["a", "b"], tokenizer("bpe"))
