"""Training with attention inside documents: `pack_documents`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptfast import GPT, GPTConfig
from gptfast.data import Mixture, MixtureSampler, WindowSampler, load_prepared, sequential_batches, write_tokens
from gptfast.data.packing import part_of
from gptfast.training import bad_step
from gptfast.training.batch_loss import batch_loss
from tests.support.train_command import SCHEDULE, SMALL, _argv, _threads, gptfast  # noqa: F401

V, T = 30, 16
LENGTHS = [3, 20, 1, 9, 40, 2, 2, 16, 17, 5] * 6


def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V - 1, n) for n in LENGTHS]


@pytest.fixture
def file(tmp_path: Path):
    return write_tokens(tmp_path / "t.bin", documents(), V, V - 1)


def model(**options: float) -> GPT:
    torch.manual_seed(0)
    net = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, vocab_size=V, **{"dropout": 0.0, **options}))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return net


def texts_of(batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The single texts of a batch and their targets, by a loop over its tokens: a text ends after the end token or its row."""
    texts = []
    for ids, targets in zip(batch[0].tolist(), batch[1].tolist(), strict=True):
        text: list[int] = []
        for n, (token, target) in enumerate(zip(ids, targets, strict=True)):
            text.append(token)
            last = n == len(ids) - 1
            assert (target == -100) == (token == V - 1) or last
            if token == V - 1 or last:
                texts.append((torch.tensor([text]), torch.tensor([[*text[1:], target]])))
                text = []
    return texts


def test_the_loss_of_a_packed_row_is_the_sum_of_its_documents_losses(file):
    net = model().train()
    batch = WindowSampler(file, T, 4, seed=1, pack_documents=True).batch(2)
    assert batch[2][0] == 0 and batch[2][-1] == 4 * T and len(batch[2]) > 8
    plain = WindowSampler(file, T, 4, seed=1).batch(2)
    assert batch[0].equal(plain[0]) and (batch[1][batch[1] != -100] == plain[1][batch[1] != -100]).all()
    total, count = 0.0, 0
    for ids, targets in texts_of(batch):
        n = int((targets != -100).sum())
        total, count = total + (net(ids, targets)[1] * n if n else 0.0), count + n
    assert count == (batch[1] != -100).sum()
    found = batch_loss(net, batch, "cpu")
    torch.testing.assert_close(found, total / count, atol=0, rtol=1e-6)
    grads = [torch.autograd.grad(loss, list(net.parameters())) for loss in (found, total / count)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # sums of some 50 positions with losses of about 5
    assert abs(found.item() - net(*plain)[1].item()) > 1e-3


def test_rows_of_a_batch_ends_of_the_text_and_mixtures(file, tmp_path: Path):
    net = model().eval()
    sampler = WindowSampler(file, T, 6, pack_documents=True)
    whole = sampler.batch_from(3)
    halves = [WindowSampler(file, T, 3, pack_documents=True).batch_from(n) for n in (3, 6)]
    for n, half in enumerate(halves):
        for a, b in zip(part_of(whole, 3 * n, 3 * n + 3), half, strict=True):
            assert a.equal(b)
    batches = list(sequential_batches(file, T, 4, pack_documents=True))
    known = sum(int((batch[1] != -100).sum()) for batch in batches)
    cuts = sum(start % T == 0 for start in file.document_starts[1:].tolist())
    assert known == len(file) - 1 - (len(file.document_starts) - 1) and cuts
    assert all(torch.isfinite(batch_loss(net, batch, "cpu")) for batch in batches)
    other = write_tokens(tmp_path / "o.bin", [np.full(5, 7)] * 40, V, V - 1)
    mixed = MixtureSampler(Mixture(("a", "b"), (file, other), (0.5, 0.5)), T, 8, pack_documents=True)
    x, y, ends = mixed.batch_from(0)
    firsts = [row for row in range(8) if (x[row] == 7).sum() > 5]
    assert 0 < len(firsts) < 8 and set((np.arange(0, 9) * T).tolist()) <= set(ends.tolist())
    for row in firsts:
        assert ((x[row] == V - 1) == (y[row] == -100)).all()
    with pytest.raises(ValueError, match="pack_documents needs a token file, which tells where documents begin"):
        WindowSampler(np.arange(100), T, 2, pack_documents=True)


@pytest.mark.parametrize("where", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_dropout_is_a_function_of_the_row_of_the_whole_batch(file, where: str):
    none = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), 0.0)
    net = model(**{"dropout": None, **none, where: 0.5}).train()
    batch = WindowSampler(file, T, 4, seed=1, pack_documents=True).batch(0)

    def gradient(parts) -> list[torch.Tensor]:
        count = int((batch[1] != -100).sum())
        net.zero_grad()
        for first, part in parts:
            net.dropout_seed, net.dropout_step, net.dropout_row = 5, 3, first
            n = int((part[1] != -100).sum())
            (batch_loss(net, part, "cpu") * (n / count)).backward()
            assert (net.dropout_step, net.dropout_row) == (4, first)
        return [p.grad.clone() for p in net.parameters()]

    whole = gradient([(0, batch)])
    ranks = gradient([(0, part_of(batch, 0, 2)), (2, part_of(batch, 2, 4))])
    for a, b in zip(whole, ranks, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)  # another order of sums
    wrong = gradient([(0, part_of(batch, 0, 2)), (0, part_of(batch, 2, 4))])
    assert not torch.allclose(whole[0], wrong[0], atol=1e-3)


def test_a_run_packs_resumes_to_the_bit_and_keeps_its_choice(tmp_path: Path, capsys, monkeypatch):
    path = tmp_path / "a.jsonl"
    lines = [{"text": f"to be or not to be {n}\n" * (n % 3 + 1)} for n in range(80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert (
        gptfast("prepare", "--data", path, "--text-field", "text", "--tokenizer", "gpt2", "--out", tmp_path / "data")
        == 0
    )
    seen = []
    original = GPT.forward

    def forward(self, ids=None, targets=None, **options):
        seen.append((ids, targets, options.get("cu_seqlens")))
        return original(self, ids, targets, **options)

    options = ["--data", tmp_path / "data", *SMALL, *SCHEDULE, "--pack-documents", "--dropout", "0.1"]
    with monkeypatch.context() as patch:
        patch.setattr(GPT, "forward", forward)
        assert gptfast("train", *options, "--out", tmp_path / "whole") == 0
    eos = load_prepared(tmp_path / "data").tokenizer.eos_id
    assert seen and all(ends is not None for _, _, ends in seen)
    assert all((targets[ids == eos] == -100).all() for ids, targets, _ in seen)
    assert gptfast("train", *options, "--out", tmp_path / "parts", "--max-steps", "5", "--lr-decay-steps", "12") == 0
    assert gptfast("train", "--out", tmp_path / "parts", "--resume", "--max-steps", "12") == 0
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()
    config = json.loads((tmp_path / "parts" / "last" / "trainer.json").read_text())["config"]
    assert config["pack_documents"] is True


def test_a_step_that_went_wrong_is_kept_with_its_ends(file, tmp_path: Path):
    net = model().train()
    batch = WindowSampler(file, T, 2, pack_documents=True).batch(0)
    net.dropout_seed, net.dropout_step = 1, 0
    with torch.no_grad():
        net.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    about = {"step": 3, "wrong": "loss is nan", "dtype": "float32", "dropout": [1, 0]}
    bad_step.keep(tmp_path / "bad", net, [batch], about)
    assert "not finite first: h.1.mlp" in bad_step.replay(tmp_path / "bad")
