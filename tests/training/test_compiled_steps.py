"""gptfast train --compile."""

from __future__ import annotations

import pytest
import torch

from gptfast.training.log import read_log
from tests.support.training import QUICK, make_trainer

COMPILED = QUICK.replace(compile=True, max_steps=4, eval_every=4)


@pytest.mark.slow  # a compilation, half a minute
def test_a_compiled_network_trains_to_the_same_losses_with_dropout_and_one_graph(tmp_path):
    from torch._dynamo.utils import counters

    make_trainer(tmp_path / "plain", COMPILED.replace(compile=False)).train()
    torch._dynamo.reset()
    counters.clear()
    make_trainer(tmp_path / "compiled", COMPILED).train()
    plain, compiled = ([r["loss"] for r in read_log(tmp_path / run / "log.jsonl")] for run in ("plain", "compiled"))
    assert compiled == pytest.approx(plain, abs=1e-5)
    assert 1 <= counters["stats"]["unique_graphs"] <= 2


def test_a_network_that_cannot_be_compiled_is_an_error(tmp_path, monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    class Broken(torch.nn.Module):
        def forward(self, *inputs):
            raise TorchDynamoException("no C++ compiler\nmore")

    monkeypatch.setattr(torch, "compile", lambda model, fullgraph: Broken())
    with pytest.raises(
        RuntimeError, match=r"torch.compile cannot compile this network here \(no C\+\+ compiler\); leave `compile` out"
    ):
        make_trainer(tmp_path, COMPILED).train()
