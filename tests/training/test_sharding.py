"""A model divided between two processes: its gradient, its norm, its files, and what goes wrong in one of them only."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gptfast.models import GPT
from gptfast.training import TrainConfig
from gptfast.training.bad_step import first_bad
from gptfast.training.checks import check_ranks
from gptfast.training.clipping import clipped_step, gradient_norm
from gptfast.training.gradients import accumulate_gradients
from gptfast.training.parts import Parts
from gptfast.training.ranks import RankLostError, Ranks
from gptfast.training.sharding import local, shard, whole_copy
from tests.support.training import SHAPE, file_size_limit

CPU = torch.device("cpu")


def clipped(parameters: list[torch.nn.Parameter], ranks: Ranks | None = None) -> float:
    """The norm of the gradients, which are then scaled to 0.5: by an optimizer that does nothing else."""
    norm = gradient_norm(parameters, ranks)
    clipped_step([torch.optim.SGD(parameters, lr=0.0)], norm, 0.5)
    return float(norm)


def model() -> GPT:
    torch.manual_seed(0)
    found = GPT(SHAPE.replace(tie_weights=False)).train()
    found.dropout_seed, found.dropout_step = 5, 0
    return found


def passes() -> list[Any]:
    g = torch.Generator().manual_seed(1)
    found = [tuple(torch.randint(0, SHAPE.vocab_size, (2, 4, 16), generator=g)) for _ in range(3)]
    found[1][1][2:] = -100  # rank 1 has no target in the second pass
    found[2][1][:] = -100  # and nobody has one in the last
    return found


def _work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        for sharding in ("forward", "pass", "step"):
            ranks, net = Ranks(rank, 2, store, store, CPU, 20.0, sharding), model()
            shard(net, ranks, torch.float32)
            net.dropout_row = 2 * rank
            own = [(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]) for x, y in passes()]
            found[f"loss {sharding}"] = accumulate_gradients(net, own, ranks=ranks)
            parameters = dict(net.named_parameters())
            assert all(local(p).numel() < p.numel() for p in parameters.values())
            found[f"norm {sharding}"] = clipped(list(parameters.values()), ranks)
            gradients = {name: p.grad.full_tensor() for name, p in parameters.items()}
            found |= {f"gradient {sharding} {name}": x for name, x in gradients.items()}
        net.h[1].mlp.register_forward_hook(lambda *_: _[2] * (float("nan") if rank else 1.0))
        found["first bad"] = first_bad(net, own, nullcontext, CPU, 0, ranks)
        copied = whole_copy(net, ranks.is_main)
        found["whole"] = copied.state_dict() if rank == 0 else {}
        _save_on_a_full_disk(ranks, net, Path(folder), found)
        torch.save(found, f"{folder}/found {rank}")
    finally:
        dist.destroy_process_group()


def _save_on_a_full_disk(ranks: Ranks, net: GPT, folder: Path, found: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    optimizer.step()
    parts, stage = Parts(ranks, 1, net, [optimizer], copy=True), folder / ".saving"
    stage.mkdir(exist_ok=True)
    with file_size_limit(2000 if ranks.rank else 10**9):
        try:
            parts.lead(lambda content: content(stage) and None) if ranks.is_main else parts.follow(folder)
        except (OSError, RankLostError) as error:
            found["save"] = f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_two_processes_that_divide_a_model_compute_what_one_does(tmp_path: Path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    both = [torch.load(tmp_path / f"found {rank}", weights_only=False) for rank in (0, 1)]
    one = model()
    loss = accumulate_gradients(one, passes())
    norm = clipped(list(one.parameters()))
    assert norm > 0.5
    for found in both:
        for sharding in ("forward", "pass", "step"):
            assert abs(found[f"loss {sharding}"] - loss) < 1e-6
            assert abs(found[f"norm {sharding}"] - norm) < 1e-5 * norm
            for name, p in one.named_parameters():
                got = found[f"gradient {sharding} {name}"]
                assert p.grad is not None
                torch.testing.assert_close(got, p.grad, rtol=0, atol=1e-6)
        assert found["first bad"] == "h.1.mlp"  # only rank 1 saw it
    expected = model().state_dict()
    assert all(both[0]["whole"][name].equal(x) for name, x in expected.items())
    assert "a rank failed; its own message says why" in both[0]["save"]
    assert both[1]["save"].startswith("OSError: [Errno 27] File too large")


def test_muon_and_a_batch_that_does_not_divide_are_refused():
    ranks = Ranks(0, 2, None, None, CPU, 1.0, "forward")
    with pytest.raises(ValueError, match=r"`optimizer` is muon.*use `optimizer` adamw, or `parallel` ddp"):
        check_ranks(TrainConfig(batch_size=4, optimizer="muon"), ranks)
    with pytest.raises(ValueError, match="`batch_size` is 5 but 2 processes share it"):
        check_ranks(TrainConfig(batch_size=5), ranks)
    check_ranks(TrainConfig(batch_size=4, optimizer="muon"), Ranks(0, 2, None, None, CPU, 1.0))
