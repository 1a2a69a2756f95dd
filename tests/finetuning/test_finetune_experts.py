"""Fine-tuning of models with experts: the loss that spreads tokens over them, and their load in the log."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from gptfast import GPT, GPTConfig, ops
from gptfast.finetuning import Conversations, TaskModel
from gptfast.finetuning.objectives import TaskObjective, TextObjective
from gptfast.nn.experts import ExpertMLP
from gptfast.training.config import AUX_LOSS_COEF, TrainConfig
from gptfast.training.log import read_log
from gptfast.training.routing import Routing
from tests.finetuning.models import EXAMPLES, LABELS, bpe
from tests.support.finetuning import base, finetune
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture
from tests.support.training import timeless

FORM: dict[str, Any] = {
    **{"n_kv_head": 2, "n_inner": 32, "n_expert": 4, "n_expert_per_tok": 2, "activation": "swiglu"},
    **{"position_embedding": "rotary", "norm": "rms_norm", "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
}
COEF = 0.3


def experts(V: int) -> GPT:
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "dropout": 0.0}
    model = GPT(GPTConfig(**{**sizes, **FORM}, vocab_size=V)).train()
    for module in model.modules():
        if isinstance(module, ExpertMLP):
            torch.nn.init.normal_(module.router.weight, std=0.5)  # far from even
    return model


def auxiliary(model: GPT, call: Any, counts: Any) -> tuple[torch.Tensor, Any]:
    """The mean over layers of the op, of the tokens that count, and what the call returned."""
    seen: list[torch.Tensor] = []
    routers = [m.router for m in model.modules() if isinstance(m, ExpertMLP)]

    def keep(_: torch.nn.Module, arguments: Any, out: torch.Tensor) -> None:
        seen.append(out)

    hooks = [router.register_forward_hook(keep) for router in routers]
    out = call()
    for hook in hooks:
        hook.remove()
    each = [ops.load_balance_loss(logits, ops.route(logits, 2)[0], counts.flatten()) for logits in seen]
    assert len(each) == 2
    return torch.stack(each).mean(), out


def assert_same_gradients(a: torch.nn.Module, b: torch.nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (x.grad is None) == (y.grad is None), name
        if x.grad is not None:
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("task", ["classification", "choice"])
def test_the_loss_of_routers_is_minimised_beside_that_of_the_task(task: str):
    """Beside the same written out; padding does not count, of a batch of two passes each has its own."""
    used = bpe()
    model = TaskModel(experts(used.vocab_size), task, labels=LABELS.get(task), tokenizer=used)
    plain: Any = copy.deepcopy(model)
    groups, targets = model.rows(EXAMPLES[task])
    batches = [model.collate([group], [target]) for group, target in zip(groups, targets or [], strict=True)]
    batches[1] = model.collate(groups, targets)
    wholes: list[torch.Tensor] = []
    found: list[float] = []
    for batch in batches:
        real = plain.real_tokens(batch["ids"], None)
        aux, out = auxiliary(plain.gpt, lambda batch=batch: plain(**batch), real)
        wholes.append((out.loss + COEF * aux) / 2)
        found.append(float(aux.detach()) / 2)
    assert not plain.real_tokens(batches[1]["ids"], None).all()
    whole = torch.stack(wholes).sum()
    whole.backward()

    routing = Routing(model.gpt, COEF)
    objective = TaskObjective(model, (groups, targets or []), ([], []), "accuracy", 0.5, lambda *_: None, routing)
    figures = objective.add_gradients(batches, nullcontext, torch.device("cpu"))
    assert figures["loss"] == pytest.approx(float(whole.detach()) - COEF * sum(found), rel=1e-5)
    assert float(figures["router_aux_loss"]) == pytest.approx(sum(found), rel=1e-6)
    assert figures["expert_load"].shape == (2, 4)
    assert_same_gradients(model, plain)


def test_the_loss_of_routers_is_minimised_beside_that_of_replies():
    """All tokens of packed conversations are routed and count, those of the prompts too."""
    used = bpe()
    model = experts(used.vocab_size)
    plain = copy.deepcopy(model)
    talk = [{"prompt": "the cat sat", "response": "on the mat"}, {"prompt": "a dog", "response": "sang to the cat"}]
    rows = Conversations(talk, used, 48).rows
    objective = TextObjective(model, rows, rows, used, lambda *_: None, Routing(model, COEF))
    (batch,) = objective.batches(0, TrainConfig(batch_size=2, max_steps=1))
    call = lambda: plain(batch.ids, batch.targets, cu_seqlens=batch.cu_seqlens)[1]  # noqa: E731
    aux, loss = auxiliary(plain, call, torch.ones_like(batch.ids, dtype=torch.bool))
    (loss + COEF * aux).backward()
    figures = objective.add_gradients([batch], nullcontext, torch.device("cpu"))
    assert figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(figures["router_aux_loss"]) == pytest.approx(float(aux.detach()), rel=1e-6)
    assert_same_gradients(model, plain)


def test_the_weight_is_for_routers_that_are_trained():
    model, config = experts(50), TrainConfig(max_steps=1)
    found = [Routing.of(model, config)]
    model.requires_grad_(False)
    found += [Routing.of(model, config), Routing.of(model, config.replace(router_aux_loss_coef=0.2))]
    assert [routing and routing.coef for routing in found] == [AUX_LOSS_COEF, 0, 0.2]


def test_a_run_logs_and_draws_loads_and_resumes_to_the_same_bits(tmp_path: Path, capsys):
    base(tmp_path / "base", **FORM)
    options = ["--method", "lora", "--router-aux-loss-coef", "0.1"]
    options += ["--min-lr", "1e-2", "--warmup-steps", "0"]  # the rate does not depend on the steps
    assert finetune(tmp_path, *options, out="whole") == 0, capsys.readouterr().err
    assert "experts.png" in capsys.readouterr().out.replace("\n", "")
    records = [r for r in read_log(tmp_path / "whole/log.jsonl") if "expert_load" in r]
    assert [r["step"] for r in records] == list(range(1, 9))
    for record in records:
        assert all(abs(sum(layer) - 1) < 1e-4 for layer in record["expert_load"])
        assert 0 < record["router_aux_loss"] < 4
    assert (tmp_path / "whole/experts.png").read_bytes().startswith(b"\x89PNG")
    assert finetune(tmp_path, *options, "--max-steps", "4", out="half") == 0
    assert gptfast("finetune", "--resume", "--max-steps", "8", "--out", tmp_path / "half") == 0
    assert timeless(tmp_path / "half") == timeless(tmp_path / "whole")


def test_methods_without_the_loss(tmp_path: Path, capsys):
    """A soft prompt trains beside experts; its vectors are no tokens whose load could be told."""
    base(tmp_path / "base", **FORM)
    assert finetune(tmp_path, "--method", "prompt", "--num-virtual-tokens", "4") == 0, capsys.readouterr().err
    assert not any("expert_load" in r for r in read_log(tmp_path / "out/log.jsonl"))
    assert finetune(tmp_path, "--method", "qlora", out="packed") == 1
    assert "does not pack the experts" in capsys.readouterr().err
    base(tmp_path / "base")
    assert finetune(tmp_path, "--router-aux-loss-coef", "0.1", out="plain") == 1
    assert "finetune: --router-aux-loss-coef is 0.1 but the model has no experts" in capsys.readouterr().err
