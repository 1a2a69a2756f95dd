"""FSDP2 (`fully_shard`) of patched models: two processes train as the unpatched model does in one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import gptfast
from tests.support.hf_models import V, hf_model

CASES = ("patched first", "sharded first", "head apart", "checkpointing")


def _model(case: str) -> Any:
    rates = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return hf_model(**rates, tie_word_embeddings=case != "head apart").train()


def _ids() -> Tensor:
    return torch.randint(3, V, (4, 24), generator=torch.Generator().manual_seed(0))


def _steps(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Losses, logits, gradients and weights of two steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, Tensor] = {}
    for n in range(2):
        outputs = model(input_ids=ids, labels=ids)
        optimizer.zero_grad()
        found |= {f"loss {n}": outputs.loss.detach()} | ({f"logits {n}": outputs.logits.detach()} if n else {})
        outputs.loss.backward()
        optimizer.step()
    for name, x in model.named_parameters():
        found |= {f"weight {name}": x.detach(), f"gradient {name}": x.grad}
    return found


def _sharded(case: str, model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block)
    if case == "head apart":
        fully_shard(model.lm_head)
    return fully_shard(model)


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    try:
        for case in CASES:
            model = _model(case)
            if case == "checkpointing":
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if case != "sharded first":
                gptfast.accelerate(model)
            _sharded(case, model)
            if case == "sharded first":
                gptfast.accelerate(model)
            found = _steps(model, _ids()[2 * rank : 2 * rank + 2])
            whole: dict[str, Any] = {n: getattr(x, "full_tensor", x.clone)() for n, x in found.items()}
            torch.save(whole, Path(folder) / f"{case} {rank}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_a_patched_model_as_one_trains_the_unpatched(tmp_path: Path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    for case in CASES:
        expected = _steps(_model(case), _ids())
        halves = [torch.load(tmp_path / f"{case} {rank}") for rank in (0, 1)]
        assert halves[0].keys() == expected.keys()
        for name, value in expected.items():
            if name.startswith("loss"):
                got = (halves[0][name] + halves[1][name]) / 2
            else:
                got = torch.cat([half[name] for half in halves]) if name.startswith("logits") else halves[0][name]
            # sums of two halves round otherwise: 2e-6 of the largest gradient was measured
            assert (got - value).abs().max() <= 1e-5 * value.abs().max(), (case, name)
