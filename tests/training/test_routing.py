"""GPTs with experts in training: the auxiliary loss of their routers, and their loads."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gptfast import GPT, GPTConfig, ops
from gptfast.nn.experts import ExpertMLP
from gptfast.training import accumulate_gradients
from gptfast.training.config import TrainConfig
from gptfast.training.log import read_log
from gptfast.training.plot import plot_experts
from gptfast.training.routing import Routing
from tests.support.training import QUICK, SHAPE, TOKENIZER, make_trainer, resumed, timeless
from tests.training.test_boards import drawn
from tests.training.test_ranks import Threads

TINY = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_kv_head": 2, "head_size": 8, "n_inner": 32, "n_expert": 4}
EXPERTS = GPTConfig.preset("gptoss-tiny", **TINY, block_size=16, window=8, vocab_size=TOKENIZER.vocab_size)


def model_and_passes() -> tuple[GPT, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = GPT(EXPERTS).train()
    for block in model.h:  # far from even
        torch.nn.init.normal_(block.mlp.router.weight, std=0.5)
    passes = []
    for _ in range(2):
        x, y = torch.randint(0, EXPERTS.vocab_size, (2, 4, 16))
        passes.append((x, y.masked_fill(torch.rand(4, 16) < 0.3, -100)))
    passes[0][1][2:] = -100  # rank 1 has no target in the first pass
    return model, passes


def gradients(model: GPT) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_of_routers_is_minimised_beside_that_of_tokens(recompute: bool):
    """Beside the same written out: the mean over layers of the op, of the tokens that have a target."""
    model, passes = model_and_passes()
    plain, coef = copy.deepcopy(model), 0.3
    seen: list[torch.Tensor] = []
    for module in plain.modules():
        if isinstance(module, ExpertMLP):
            module.router.register_forward_hook(lambda _, args, out: seen.append(out))
    targets = sum(int((y != -100).sum()) for _, y in passes)
    losses, auxiliary = [], []
    for x, y in passes:
        seen.clear()
        loss, count = plain(x, y)[1], (y != -100).flatten()
        each = [ops.load_balance_loss(logits, ops.route(logits, 2)[0], count) for logits in seen]
        losses.append(loss * int(count.sum()) / targets)
        auxiliary.append(torch.stack(each).mean() * int(count.sum()) / targets)
    (sum(losses) + coef * sum(auxiliary)).backward()

    model.recompute = recompute
    routing = Routing(model, coef)
    got = accumulate_gradients(model, passes, routing=routing)
    assert got == pytest.approx(sum(losses).item(), rel=1e-6)
    figures = routing.figures()
    assert float(figures["router_aux_loss"]) == pytest.approx(sum(auxiliary).item(), rel=1e-6)
    assert figures["expert_load"].shape == (2, 4)
    torch.testing.assert_close(figures["expert_load"].sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-4)
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(module.routed is None for module in model.modules() if isinstance(module, ExpertMLP))


def test_ranks_have_the_loss_the_load_and_the_gradient_of_one_process():
    model, passes = model_and_passes()
    models = [copy.deepcopy(model) for _ in range(3)]
    alone = Routing(models[2], 0.3)
    expected = accumulate_gradients(models[2], passes, routing=alone)
    table, barrier = [None, None], threading.Barrier(2)

    def step(rank: int) -> tuple[float, dict]:
        own = [(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]) for x, y in passes]
        threads = Threads(rank, 2, table, barrier)
        routing = Routing(models[rank], 0.3, threads)
        return accumulate_gradients(models[rank], own, ranks=threads, routing=routing), routing.figures()

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(step, range(2)))
    for loss, figures in found:
        assert loss == pytest.approx(expected, abs=1e-6)
        assert figures["router_aux_loss"] == pytest.approx(float(alone.figures()["router_aux_loss"]), abs=1e-6)
        assert figures["expert_load"].equal(alone.figures()["expert_load"])
    for a, b, whole in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(a.grad + b.grad, whole.grad, rtol=0, atol=1e-6)


def test_a_run_logs_and_draws_loads_and_continues_to_the_same_bits(tmp_path):
    config = QUICK.replace(max_steps=4, eval_every=2, checkpoint_every=2, keep_last=2, warmup_steps=1)
    make_trainer(tmp_path / "whole", config, EXPERTS, tensorboard=True).train()
    whole = read_log(tmp_path / "whole/log.jsonl")
    for record in whole:
        load = torch.tensor(record["expert_load"])
        assert load.shape == (2, 4) and (load.sum(1) - 1).abs().max() < 1e-4
        assert record["router_aux_loss"] >= 1.0 and record["router_aux_loss"] < 4.0
    board = drawn(tmp_path / "whole/tensorboard")
    assert [value for _, value in board["expert_load/1/3"]] == pytest.approx([r["expert_load"][1][3] for r in whole])
    assert [step for step, _ in board["router_aux_loss"]] == [1, 2, 3, 4]
    assert (tmp_path / "whole/experts.png").read_bytes().startswith(b"\x89PNG")

    make_trainer(tmp_path / "half", config.replace(max_steps=2, lr_decay_steps=4), EXPERTS).train()
    resumed(tmp_path / "half", config.replace(lr_decay_steps=4)).train()
    assert timeless(tmp_path / "half") == timeless(tmp_path / "whole")
    for name in ("model", "optimizer"):
        both = [(tmp_path / run / f"last/{name}.safetensors").resolve().read_bytes() for run in ("whole", "half")]
        assert both[0] == both[1]


def test_a_weight_evens_the_load(tmp_path):
    config = QUICK.replace(max_steps=25, eval_every=25, learning_rate=1e-2, log_every=1)
    last = {}
    for coef in (0.0, 1.0):
        make_trainer(tmp_path / str(coef), config.replace(router_aux_loss_coef=coef), EXPERTS).train()
        last[coef] = sum(r["router_aux_loss"] for r in read_log(tmp_path / f"{coef}/log.jsonl")[-5:]) / 5
    assert last[1.0] < 2.03 < last[0.0]  # measured 2.00 and 2.07; 2 is even


def test_refusals_and_what_has_no_experts(tmp_path):
    with pytest.raises(ValueError, match=r"`router_aux_loss_coef` is 0\.01 but the model has no experts"):
        make_trainer(tmp_path, QUICK.replace(router_aux_loss_coef=0.01), SHAPE)
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is -1"):
        TrainConfig(router_aux_loss_coef=-1.0)
    plot_experts([{"step": 1, "loss": 2.0}], tmp_path / "experts.png")
    assert not (tmp_path / "experts.png").exists()
    logits = torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"load_balance_loss: sent has shape \(3,\); expected \(4,\)"):
        ops.load_balance_loss(logits, ops.route(logits, 2)[0], sent=torch.ones(3))
