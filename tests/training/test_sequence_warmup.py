"""Rows that grow over the first steps."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from gptfast.models import GPT
from gptfast.training import TrainConfig
from gptfast.training.schedule import row_length
from tests.support.training import QUICK, SHAPE, make_trainer, resumed

GROWING = QUICK.replace(sequence_warmup=8, sequence_warmup_from=4)


def test_the_lengths_are_divisors_in_turn():
    config = TrainConfig(sequence_warmup=10)
    assert [row_length(step, 1024, config) for step in (0, 1, 2, 5, 9, 10)] == [128, 128, 256, 512, 512, 1024]
    assert [row_length(step, 16, GROWING) for step in range(10)] == [4, 4, 4, 8, 8, 8, 8, 8, 16, 16]
    assert row_length(0, 16, QUICK) == 16
    for size in (13, 16):
        with pytest.raises(ValueError, match=f"block_size {size} has no divisor from 9"):
            row_length(0, size, TrainConfig(sequence_warmup=4, sequence_warmup_from=9))


def test_a_step_has_the_same_tokens_in_shorter_rows_and_resumes_to_the_bit(tmp_path, monkeypatch):
    seen, forward = [], GPT.forward

    def watched(self, ids, targets=None, **options):
        if self.training:
            seen.append((ids, targets))
        return forward(self, ids, targets, **options)

    monkeypatch.setattr(GPT, "forward", watched)
    make_trainer(tmp_path / "whole", GROWING).train()
    shapes = [tuple(ids.shape) for ids, _ in seen]
    assert shapes == 3 * [(16, 4)] + 5 * [(8, 8)] + 4 * [(4, 16)]
    whole = [ids.flatten() for ids, _ in seen]
    seen.clear()
    make_trainer(tmp_path / "plain", QUICK).train()
    assert all(torch.equal(a, ids.flatten()) for a, (ids, _) in zip(whole, seen, strict=True))
    make_trainer(tmp_path / "parts", GROWING.replace(max_steps=5, lr_decay_steps=12)).train()
    resumed(tmp_path / "parts", GROWING).train()
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_part_of_a_rank_has_its_place_among_the_shorter_rows():
    class Second:
        rank, size, sharding, share = 1, 2, "", 1

        def rows(self, batch_size):
            return batch_size // 2

    from gptfast.training.language_modelling import LanguageModelling
    from tests.support.training import TRAIN, VAL

    objective = LanguageModelling(GPT(SHAPE), TRAIN, VAL, GROWING, ranks=Second())
    for step, (rows, first) in {0: (8, 8), 4: (4, 4), 8: (2, 2)}.items():
        ((x, _),) = objective.cut(objective.batches(0, GROWING), step, GROWING)
        assert (len(x), objective.network.dropout_row) == (rows, first)


def test_what_cannot_be_cut_is_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="`sequence_warmup` cuts rows into equal parts, but block_size 13"):
        make_trainer(tmp_path, QUICK.replace(sequence_warmup=5), SHAPE.replace(block_size=13))
