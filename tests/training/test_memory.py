"""The memory that a step needs is told before the first one."""

from __future__ import annotations

import pytest
import torch

from gptfast import GPTConfig
from gptfast.models import BERT, GPT
from gptfast.training import TrainConfig, memory
from gptfast.training.memory import look_at_memory
from tests.support.training import QUICK, SHAPE, make_trainer

CPU = torch.device("cpu")
BYTES = TrainConfig(device="cpu", dtype="float32")


@pytest.fixture
def machine(monkeypatch):
    """A function that says how many bytes are free, and how many there are."""
    return lambda free, total: monkeypatch.setattr(memory, "_memory", lambda device: (free, total))


def needed(machine, config: TrainConfig, model=None) -> float:
    """Gigabytes that are said to be needed, where one byte is free."""
    machine(1, 10**18)
    said = look_at_memory(model or GPT(SHAPE), config, CPU, 16)
    assert "and only 1e-09 GB are free: the system may end the run; take fewer rows a pass (batch_size)" in said
    return float(said.split()[2])


def test_what_a_pass_keeps_is_counted(machine):
    few, many = (needed(machine, BYTES.replace(batch_size=n)) for n in (1000, 2000))
    assert many == pytest.approx(2 * few, rel=0.05)
    assert needed(machine, BYTES.replace(batch_size=1000, recompute=True)) < 0.8 * few
    model = GPT(SHAPE).train()
    kept: dict[int, int] = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.zeros((1000, 16), dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model(ids, ids)[1]
    # The narrow model has a vocabulary of 64, biases do not scale, and two digits are told: 1.5% measured.
    assert sum(kept.values()) / 1e9 == pytest.approx(few, rel=0.1) and loss.isfinite()


def test_optimizer_average_and_passes_are_counted(machine):
    model = GPT(SHAPE.replace(n_embd=256, n_head=4))  # 1.6 million parameters
    one = needed(machine, BYTES.replace(batch_size=1), model)
    weights = sum(p.nbytes for p in model.parameters()) / 1e9
    assert one == pytest.approx(3 * weights, rel=0.1)
    assert needed(machine, BYTES.replace(batch_size=1, ema=0.9), model) == pytest.approx(4 * weights, rel=0.1)
    assert needed(machine, BYTES.replace(batch_size=1, optimizer="lion"), model) == pytest.approx(2 * weights, rel=0.1)


def test_masked_language_modelling_is_known_too(machine):
    shape = GPTConfig.preset("bert-base", n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=40)
    assert needed(machine, BYTES.replace(objective="mlm", batch_size=1000), BERT(shape)) > 0.01


def test_what_is_small_or_not_known_costs_nothing(machine, monkeypatch):
    monkeypatch.setattr(memory, "activations", lambda *_: 1 / 0)
    machine(10**9, 10**9)
    assert look_at_memory(GPT(SHAPE), BYTES, CPU, 16) == ""
    monkeypatch.setattr(memory, "_memory", lambda device: None)
    assert look_at_memory(GPT(SHAPE), BYTES.replace(batch_size=10**9), CPU, 16) == ""


def test_numbers_that_are_drawn_stay(machine):
    model = GPT(SHAPE)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    needed(machine, BYTES, model)
    assert torch.equal(torch.rand(3), expected)


def test_a_run_says_it_or_does_not_begin(tmp_path, machine, capsys):
    machine(1, 10**18)
    make_trainer(tmp_path / "run", QUICK).train()
    machine(1, 1)
    with pytest.raises(
        MemoryError, match=r"Trainer: a step needs at least .* but there are 1e-09 GB in all; take fewer rows"
    ):
        make_trainer(tmp_path / "run", QUICK, overwrite=True)
    assert (tmp_path / "run" / "last").exists()
