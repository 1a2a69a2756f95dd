"""The search for the largest batch that fits."""

from __future__ import annotations

import pytest
import torch

from gptfast.models import GPT
from gptfast.training import TrainConfig, find_batch
from gptfast.training.checks import check_ranks
from gptfast.training.find_batch import _sizes, fitted
from tests.support.training import QUICK, SHAPE

MB = 1 << 20
STEP = QUICK.replace(batch_size=4, grad_accum=12)  # 48 rows


@pytest.fixture
def machine(monkeypatch):
    """A machine whose passes take 10 MB a row; `machine["free"]` MB are free. Returns it, with the sizes that were tried."""
    found = {"free": 0, "tried": [], "peak": 100 * MB}

    def run(self, rows: int) -> None:
        found["tried"].append(rows)
        found["peak"] = max(found["peak"], (100 + 10 * rows) * MB)

    monkeypatch.setattr(find_batch._Trial, "_pass", run)
    monkeypatch.setattr(find_batch, "resident", lambda: 100 * MB)
    monkeypatch.setattr(find_batch, "peak", lambda: found["peak"])
    monkeypatch.setattr(find_batch, "free_memory", lambda: found["free"] * MB)
    return found


def test_sizes_are_doubled_divisors():
    assert _sizes(48) == [1, 2, 4, 8, 16, 48] and _sizes(1) == [1] and _sizes(7) == [1, 7] and _sizes(24)[-1] == 24


@pytest.mark.parametrize(
    ("free", "batch", "tried"), [(200, 16, [1, 2, 4, 8, 16]), (12, 1, [1]), (1000, 48, [1, 2, 4, 8, 16, 48])]
)
def test_the_largest_pass_that_fits_keeps_the_rows_of_a_step(machine, free, batch, tried):
    machine["free"] = free
    model = GPT(SHAPE)
    model.dropout_seed, model.dropout_step = 5, 3
    config, text = fitted(model, STEP)
    assert (config.batch_size, config.grad_accum) == (batch, 48 // batch) and machine["tried"] == tried
    assert f"{batch} rows a pass" in text and f"{48 // batch} passes a step" in text
    assert model.dropout_step == 3 and all(p.grad is None for p in model.parameters())


def test_a_pass_is_no_larger_than_the_first_step(machine):
    machine["free"] = 1000
    config, text = fitted(GPT(SHAPE), STEP.replace(batch_warmup_tokens=1000, batch_warmup_from=150))  # 9 rows of 16
    assert (config.batch_size, config.grad_accum, config.passes(0, 16)) == (8, 6, 1) and "`batch_warmup_from`" in text


def test_not_even_one_row(machine):
    machine["free"] = 5
    with pytest.raises(MemoryError, match=r"not enough memory for a pass of 1 row"):
        fitted(GPT(SHAPE), STEP)


def test_a_refused_allocation_ends_the_search_and_other_errors_show(machine, monkeypatch):
    machine["free"] = 10_000

    def refused(self, rows: int) -> None:
        if rows >= 8:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(find_batch._Trial, "_pass", refused)
    assert fitted(GPT(SHAPE), STEP)[0].batch_size == 4
    monkeypatch.setattr(find_batch._Trial, "_pass", lambda self, rows: torch.ones(2) + torch.ones(3))
    with pytest.raises(RuntimeError, match="must match"):
        fitted(GPT(SHAPE), STEP)


def test_a_gpu_is_filled_until_it_refuses(machine, monkeypatch):
    def run(self, rows: int) -> None:
        if rows >= 16:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(find_batch._Trial, "_pass", run)
    trial = find_batch._Trial(GPT(SHAPE), STEP, torch.device("cpu"))
    assert trial._on_gpu([1, 2, 4, 8, 16, 48]) == 8


@pytest.mark.parametrize("option", ["ema", "compile"])
def test_a_divided_model_refuses_what_needs_the_whole(option):
    class Divided:
        size, sharding = 2, "forward"

        def rows(self, batch_size):
            return batch_size // 2

    with pytest.raises(ValueError, match=f"`{option}` needs the whole model in each process, but `parallel` fsdp"):
        check_ranks(QUICK.replace(**{option: 0.5 if option == "ema" else True}), Divided())
    with pytest.raises(ValueError, match="`find_batch_size` needs the whole model"):
        fitted(GPT(SHAPE), STEP, Divided())


@pytest.mark.parametrize("option", ["sequence_warmup", "compile"])
def test_packed_documents_are_not_cut_or_compiled(option):
    with pytest.raises(ValueError, match=f"pack_documents and {option} exclude each other"):
        TrainConfig(pack_documents=True, **{option: True if option == "compile" else 5})
