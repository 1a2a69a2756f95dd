"""BERT against transformers: logits, losses, gradients and files both ways; padding, token types, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptfast
from gptfast.checkpoints.family_files import sources
from gptfast.models import BERT, GPT, GPTConfig, KVCache, load_model
from gptfast.models.parameter_table import parameter_table
from gptfast.nn.meta import only_shapes

transformers = pytest.importorskip("transformers")

SIZES = {
    **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56},
    **{"max_position_embeddings": 40, "attn_implementation": "eager"},
}
CLASSES = ("BertForPreTraining", "BertForMaskedLM", "BertModel")
CLOSE = {"rtol": 1e-5, "atol": 2e-5}  # measured: 1e-6 of logits of size 1 to 5


def theirs_of(name: str, **options) -> torch.nn.Module:
    """With values that are not those of an initialisation, so that each parameter matters."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(transformers.BertConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * (0.2 if p.dim() > 1 else 0.3) + (p.dim() == 1) * 0.8)
    return model


def batch_of(rows: int = 3, T: int = 21, types: int = 2) -> dict[str, torch.Tensor]:
    """Rows that are padded on the right, one on the left too, and token types."""
    draw = torch.Generator().manual_seed(1)
    mask = torch.ones(rows, T, dtype=torch.int64)
    mask[0, 13:] = 0
    mask[1, 3:5] = 0
    return {
        "input_ids": torch.randint(97, (rows, T), generator=draw),
        "attention_mask": mask,
        "token_type_ids": torch.randint(types, (rows, T), generator=draw),
    }


def outputs(
    model: BERT, batch: dict[str, torch.Tensor], theirs: torch.nn.Module
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of ours and theirs, where the rows are no padding."""
    real = batch["attention_mask"] != 0
    with torch.no_grad():
        wanted = theirs(**batch)
        hidden = model.hidden_states(batch["input_ids"], **{k: x for k, x in batch.items() if k != "input_ids"})
        found = []
        if model.config.head_transform:
            logits = wanted.logits if hasattr(wanted, "logits") else wanted.prediction_logits
            found.append((model(**batch)[real], logits[real]))
        else:
            found.append((hidden[real], wanted.last_hidden_state[real]))
        if model.config.next_sentence_head:
            found.append((model.next_sentence_logits(hidden), wanted.seq_relationship_logits))
        elif model.config.pooler:
            found.append((model.pooled(hidden), wanted.pooler_output))
    return found


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize(
    "options",
    [{}, {"hidden_act": "gelu_new", "type_vocab_size": 3, "layer_norm_eps": 1e-3}, {"tie_word_embeddings": False}],
    ids=["usual", "others", "untied"],
)
def test_logits_and_files_are_those_of_transformers(name: str, options: dict, tmp_path: Path):
    theirs = theirs_of(name, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    assert type(ours) is BERT
    batch = batch_of(types=options.get("type_vocab_size", 2))
    for a, b in outputs(ours, batch, theirs):
        torch.testing.assert_close(a, b, **CLOSE)
    assert ours.num_parameters() == sum(row.count for row in parameter_table(ours.config))
    if options.get("tie_word_embeddings", True):
        assert ours.num_parameters() == theirs.num_parameters()
    ours.save_pretrained(tmp_path / "ours")
    one, two = (load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "ours"))
    assert one.keys() == two.keys() or name == "BertModel"  # whose file has no "bert." before the names
    again, report = type(theirs).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    for a, b in outputs(ours, batch, again.eval()):
        torch.testing.assert_close(a, b, **CLOSE)
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["model_type"] == "bert" and written["architectures"] == [name]
    assert BERT.from_pretrained(tmp_path / "ours").config.resolved() == ours.config.resolved()


def test_losses_and_gradients_of_pre_training(tmp_path: Path):
    theirs, batch = (
        theirs_of("BertForPreTraining", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        batch_of(),
    )
    theirs.save_pretrained(tmp_path)
    ours = BERT.from_pretrained(tmp_path).train()
    labels = torch.where(torch.rand(3, 21, generator=torch.Generator().manual_seed(2)) < 0.3, batch["input_ids"], -100)
    labels[batch["attention_mask"] == 0] = -100  # transformers would count padding
    follows = torch.tensor([0, 1, 1])
    wanted = theirs(**batch, labels=labels, next_sentence_label=follows).loss
    logits, loss = ours(**batch, labels=labels, next_sentence_label=follows)
    assert logits is None
    torch.testing.assert_close(loss, wanted, **CLOSE)
    torch.testing.assert_close(ours.eval()(**batch, targets=labels, next_sentence_label=follows)[1], wanted, **CLOSE)
    wanted.backward()
    loss.backward()
    theirs_by_name, gradients = dict(theirs.named_parameters()), {n: p.grad for n, p in ours.named_parameters()}
    for key, source in sources("bert", ours.config, list(gradients)):
        if key in theirs_by_name:  # a tied name is there once; measured: 2e-6 of gradients up to 3
            torch.testing.assert_close(
                source.form(gradients[source.name]), theirs_by_name[key].grad, rtol=1e-4, atol=2e-5, msg=key
            )


def test_padding_changes_no_logits_and_every_position_sees_all():
    torch.manual_seed(0)
    model = BERT(GPTConfig.preset("bert-base", n_layer=2, n_head=2, n_embd=16, vocab_size=50, block_size=12)).eval()
    ids = torch.randint(50, (1, 7))
    longer = torch.cat((ids, torch.full((1, 5), 99)), 1)  # ids of padding may be any
    mask = (torch.arange(12) < 7).long()[None]
    torch.testing.assert_close(model(longer, attention_mask=mask)[:, :7], model(ids), rtol=0, atol=1e-6)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 1) % 50
    assert (model(other) - model(ids)).abs().amax(-1).min() > 1e-5  # rounding is 1e-7; the last token reaches the first


def test_published_checkpoints_with_older_names(tmp_path: Path):
    """gamma and beta, more heads than the class has, and a buffer: as the first BERTs were saved."""
    theirs = theirs_of("BertForPreTraining")
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for new, old in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
        tensors = {key.replace(new, old): x for key, x in tensors.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "architectures": ["BertForMaskedLM"]}))
    ours = BERT.from_pretrained(tmp_path)
    assert ours.config.next_sentence_head
    for a, b in outputs(ours, batch_of(), theirs):
        torch.testing.assert_close(a, b, **CLOSE)


def test_presets_have_the_parameters_of_transformers():
    for preset in ("bert-base", "bert-large"):
        config = GPTConfig.preset(preset)
        sizes = {
            "hidden_size": config.n_embd,
            "num_hidden_layers": config.n_layer,
            "num_attention_heads": config.n_head,
        }
        with only_shapes():
            theirs = transformers.BertForPreTraining(
                transformers.BertConfig(**sizes, intermediate_size=config.inner_dim)
            )
            assert BERT(config).num_parameters() == theirs.num_parameters()


def test_what_a_bert_and_a_gpt_refuse(tmp_path: Path):
    small = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 20, "block_size": 8}
    config = GPTConfig.preset("bert-base", **small)
    ids = torch.zeros(1, 4, dtype=torch.int64)
    model, gpt = BERT(config), GPT(GPTConfig(**small))
    cases = [
        (lambda: GPT(config), "causal=False"),
        (lambda: BERT(GPTConfig(**small)), "causal=True"),
        (lambda: GPTConfig(**small, pooler=True), "pooler=True is for causal=False"),
        (lambda: GPTConfig(**small, causal=False, next_sentence_head=True), "pooler is False"),
        (lambda: GPTConfig(**small, causal=False, attention_pattern="alternating", window=2), "no kernel has a band"),
        (lambda: model.eval()(ids, cache=KVCache(config, 1)), "cache with causal=False"),
        (lambda: model(ids, token_type_ids=ids + 2), "token_type_ids holds token id 2"),
        (lambda: model(ids, token_type_ids=ids[:, :2]), "expected equal shapes"),
        (lambda: model(ids, next_sentence_label=torch.zeros(1, dtype=torch.int64)), "targets or labels beside it"),
        (lambda: model(ids, ids, next_sentence_label=torch.zeros(2, dtype=torch.int64)), r"expected \(1,\) int64"),
        (lambda: gpt(ids, ids, next_sentence_label=torch.zeros(1, dtype=torch.int64)), "next_sentence_head"),
        (
            lambda: BERT(config.replace(pooler=False, next_sentence_head=False)).pooled(torch.zeros(1, 2, 8)),
            "no pooler",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="token_type_ids is not taken"):
        gpt(ids, token_type_ids=ids)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use gptfast\.BERT"):
        GPT.from_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "is_decoder": True}))
    with pytest.raises(ValueError, match="is_decoder is True"):
        BERT.from_pretrained(tmp_path)


def test_dropout_repeats_and_recompute_changes_no_gradient():
    config = GPTConfig.preset("bert-base", n_layer=2, n_head=2, n_embd=16, vocab_size=50, block_size=12)
    torch.manual_seed(0)
    model, batch = gptfast.BERT(config).train(), batch_of(2, 12)
    ids = batch["input_ids"] % 50

    def gradients(recompute: bool) -> list[torch.Tensor]:
        model.dropout_seed, model.dropout_step, model.recompute = 5, 3, recompute
        model.zero_grad()
        model(ids, ids, attention_mask=batch["attention_mask"][:, :12], token_type_ids=batch["token_type_ids"])[
            1
        ].backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    first, second = gradients(False), gradients(True)
    assert len(first) > 20
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
