"""A model divided between two processes: its gradient, its norm, its files, and what goes wrong in one of them only."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

from gptfast.data.packing import packed, part_of
from gptfast.models import GPT, GPTConfig
from gptfast.training import TrainConfig
from gptfast.training.bad_step import BATCHES, first_bad, replay
from gptfast.training.checkpoint import TrainState, described_run, write_checkpoint
from gptfast.training.checks import check_ranks
from gptfast.training.checksums import verify
from gptfast.training.clipping import clipped_step, gradient_norm
from gptfast.training.copies import Copies
from gptfast.training.division import Division, gathered, local
from gptfast.training.gradients import accumulate_gradients
from gptfast.training.join import join
from gptfast.training.language_modelling import LanguageModelling
from gptfast.training.optim import build_optimizers, empty_optimizer_tensors, optimizer_tensors
from gptfast.training.options import RunOptions
from gptfast.training.parts import Parts, optimizer_parts, read_parts
from gptfast.training.ranks import RankLostError, Ranks
from gptfast.training.sharding import shard, whole_copy
from tests.support.processes import forking
from tests.support.training import SHAPE, TOKENIZER, file_size_limit

CPU = torch.device("cpu")
WAYS = [(*way, torch.float32, False) for way in (("forward", 1), ("pass", 1), ("step", 1), ("forward", 2))]
WAYS += [("forward", tensor, torch.bfloat16, False) for tensor in (1, 2)]
WAYS += [
    ("forward", tensor, torch.float32, True) for tensor in (1, 2)
]  # reshard, tensor_parallel, dtype, packed documents

LAYERS = "layers"  # folder of what a model divided by layers saves


def autocast(dtype: torch.dtype) -> Any:
    return lambda: nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


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


def passes(packs: bool = False) -> list[Any]:
    g = torch.Generator().manual_seed(1)
    found = [tuple(torch.randint(0, SHAPE.vocab_size, (2, 4, 16), generator=g)) for _ in range(3)]
    found[1][1][2:] = -100  # rank 1 has no target in the second pass
    found[2][1][:] = -100  # and nobody has one in the last
    begins = torch.rand(3, 4, 17, generator=g).numpy() < 0.2
    return [packed(*batch, begins[n]) for n, batch in enumerate(found)] if packs else found


def _work(rank: int, folder: str) -> None:
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    try:
        for sharding, tensor, dtype, packs in WAYS:
            ranks, net = Ranks(rank, 2, store, store, CPU, 20.0, sharding, tensor), model()
            ranks.connect()
            shard(net, ranks, dtype)
            net.dropout_row, end = 2 * ranks.share, 2 * ranks.share + 4 // ranks.shares
            own = [part_of(batch, net.dropout_row, end) for batch in passes(packs)]
            way = f"{sharding} {tensor} {dtype} {packs}"
            found[f"loss {way}"] = accumulate_gradients(net, own, autocast(dtype), ranks=ranks)
            parameters = dict(net.named_parameters())
            divided = [
                p for name, p in parameters.items() if tensor == 1 or name.endswith(("c_fc.weight", "c_attn.bias"))
            ]
            assert all(local(p).numel() < p.numel() for p in divided)
            found[f"norm {way}"] = clipped(list(parameters.values()), ranks)
            found |= {f"gradient {way} {name}": gathered(name, p.grad, ranks) for name, p in parameters.items()}
            assert all(p.dtype == p.grad.dtype == torch.float32 for p in parameters.values())
            if tensor == 2 and dtype == torch.float32 and not packs:
                _save(ranks, net, Path(folder), found)
        ranks, net = Ranks(rank, 2, store, store, CPU, 20.0, "step"), model()
        ranks.connect()
        shard(net, ranks, torch.float32)
        own = [(x[2 * rank : 2 * rank + 2], y[2 * rank : 2 * rank + 2]) for x, y in passes()]
        net.h[1].mlp.register_forward_hook(lambda *_: _[2] * (float("nan") if rank else 1.0))
        found["first bad"] = first_bad(net, own, nullcontext, CPU, 0, ranks)
        _bad_step(rank, store, Path(folder), found)
        copied = whole_copy(net, ranks)
        found["whole"] = copied.state_dict() if rank == 0 else {}
        _save_on_a_full_disk(ranks, net, Path(folder), found)
        torch.save(found, f"{folder}/found {rank}")
    finally:
        dist.destroy_process_group()


def _bad_step(rank: int, store: Any, folder: Path, found: dict[str, Any]) -> None:
    """A step that is not finite in the rows of rank 1, where each has the whole model."""
    net, ranks = model(), Ranks(rank, 2, store, store, CPU, 20.0)
    config = TrainConfig(batch_size=4, grad_accum=2, block_size=16)
    trained = LanguageModelling(
        net, np.arange(500) % SHAPE.vocab_size, np.arange(99) % SHAPE.vocab_size, config, ranks=ranks
    )
    batches = trained.batches(8, config)
    hook = net.h[1].mlp.register_forward_hook(lambda *_: _[2] * (float("nan") if rank else 1.0))
    place, where = trained.where_not_finite(batches, nullcontext, CPU, 3)
    hook.remove()  # a model with one is not written
    shown = trained.batches_of(where, 8, 0, config) if rank == 0 else batches
    about = {"step": 1, "wrong": "nan", "dtype": "float32", "dropout": [5, 3]}
    command = trained.keep(folder / "bad-step", shown, about, where)
    found["bad step"] = place, where, command, batches, net.dropout_row


def _save(ranks: Ranks, net: GPT, folder: Path, found: dict[str, Any]) -> None:
    """Files of a model divided by layers, and what they are to hold."""
    optimizers = build_optimizers(net, TrainConfig())
    for optimizer in optimizers:
        optimizer.step()
    parts, saved = Parts(ranks, 7, net, optimizers, copies=None), folder / LAYERS
    about = described_run(net, TrainState(), TrainConfig(), {})
    save = partial(write_checkpoint, saved, about, TOKENIZER)
    parts.lead(save) if ranks.is_main else parts.follow(saved)
    state = {name: x for name, x in optimizer_tensors(net, optimizers).items() if x.dim()}
    found["state"] = {name: gathered(name, x, ranks) for name, x in state.items()}
    found["trained"] = whole_copy(net, ranks).state_dict()
    wanted = empty_optimizer_tensors(net, optimizers)
    read_parts(optimizer_parts(saved), wanted, ranks)
    assert all(local(wanted[name]).equal(local(x)) for name, x in state.items())


def _save_on_a_full_disk(ranks: Ranks, net: GPT, folder: Path, found: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    optimizer.step()
    parts, stage = Parts(ranks, 1, net, [optimizer], copies=Copies()), folder / ".saving"
    stage.mkdir(exist_ok=True)
    told = (folder / "store").stat().st_size + 2000  # what the ranks tell each other is a file here
    with file_size_limit(told if ranks.rank else 10**9):
        try:
            parts.lead(lambda content: content(stage) and None) if ranks.is_main else parts.follow(folder)
        except (OSError, RankLostError) as error:
            found["save"] = f"{type(error).__name__}: {error}"


@pytest.mark.slow
def test_two_processes_that_divide_a_model_compute_what_one_does(tmp_path: Path):
    forking()
    mp.start_processes(_work, (str(tmp_path),), nprocs=2, start_method="forkserver")  # pyright: ignore[reportPrivateImportUsage]
    both = [torch.load(tmp_path / f"found {rank}", weights_only=False) for rank in (0, 1)]
    for sharding, tensor, dtype, packs in WAYS:
        one = model()
        loss = accumulate_gradients(one, passes(packs), autocast(dtype))
        norm = clipped(list(one.parameters()))
        assert norm > 0.5
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3
        for found in both:
            way = f"{sharding} {tensor} {dtype} {packs}"
            assert abs(found[f"loss {way}"] - loss) < tolerance
            assert abs(found[f"norm {way}"] - norm) < 10 * tolerance * norm
            for name, p in one.named_parameters():
                assert p.grad is not None
                torch.testing.assert_close(found[f"gradient {way} {name}"], p.grad, rtol=0, atol=tolerance)
    for found in both:
        assert found["first bad"] == ("h.1.mlp", 1)  # only rank 1 saw it
        assert found["bad step"][:2] == ("h.1.mlp", 1) and found["bad step"][2].endswith(
            f"bad_step {tmp_path}/bad-step"
        )
    kept = load_file(tmp_path / "bad-step" / BATCHES)
    for n, (x, y) in enumerate(both[1]["bad step"][3]):
        assert x.shape == (2, 16) and kept[f"x{n}"].equal(x) and kept[f"y{n}"].equal(y)
        assert not both[0]["bad step"][3][n][0].equal(x)
    assert json.loads((tmp_path / "bad-step" / "step.json").read_text())["first_row"] == both[1]["bad step"][4] == 2
    assert "everything is finite this time" in replay(tmp_path / "bad-step")
    saved = tmp_path / LAYERS
    assert len(verify(saved)) >= 9
    files = optimizer_parts(saved)
    assert len(files) == 6
    state = {name: torch.zeros_like(x) for name, x in both[0]["state"].items()}
    read_parts(files, state)
    assert all(x.abs().sum() > 0 and x.equal(both[0]["state"][name]) for name, x in state.items())
    stored = GPT.from_pretrained(saved).state_dict()
    assert all(stored[name].equal(x) for name, x in both[0]["trained"].items())
    expected = model().state_dict()
    assert all(both[0]["whole"][name].equal(x) for name, x in expected.items())
    assert "a rank failed; its own message says why" in both[0]["save"]
    assert both[1]["save"].startswith(
        f"OSError: [Errno 27] cannot write to {tmp_path}: File too large; what was there is intact"
    )


def test_muon_and_a_batch_that_does_not_divide_are_refused():
    ranks = Ranks(0, 2, None, None, CPU, 1.0, "forward")
    with pytest.raises(ValueError, match=r"`optimizer` is muon.*use `optimizer` adamw, or `parallel` ddp"):
        check_ranks(TrainConfig(batch_size=4, optimizer="muon"), ranks)
    with pytest.raises(ValueError, match="`batch_size` is 5 but 2 processes share it"):
        check_ranks(TrainConfig(batch_size=5), ranks)
    check_ranks(TrainConfig(batch_size=4, optimizer="muon"), Ranks(0, 2, None, None, CPU, 1.0))


def test_parts_of_all_ranks_are_the_whole_and_heads_are_not_cut():
    for shape, dim, bands in (((24, 5), 0, 3), ((24,), 0, 3), ((12, 8), 1, 1), ((12, 8), 0, 1), ((7, 3), None, 1)):
        whole = torch.arange(float(torch.Size(shape).numel())).view(shape)
        for size, tensor in ((1, 1), (3, 1), (2, 2), (4, 2), (6, 2), (8, 4), (20, 2)):
            if dim is None or whole.shape[dim] // bands % tensor == 0:
                one = Division(shape, 0, size, tensor, dim if tensor > 1 else None, bands if tensor > 1 else 1)
                parts = {}
                for division in map(one.of, range(size)):
                    boxes = [whole[box] for box in division.boxes()]
                    own = torch.cat(boxes) if boxes else whole.new_empty(0)
                    assert own.shape == division.shape_of_own
                    parts |= {division.rank: own} if division.is_first else {}
                assert sum(part.numel() for part in parts.values()) == whole.numel()
                assert one.put_together(parts).equal(whole)
    second = Division((24, 5), 1, 2, 2, 0, 3)  # queries, keys, values: eight rows each, of which it has the later four
    assert [box[0] for box in second.boxes()] == [slice(4, 8), slice(12, 16), slice(20, 24)]


def test_what_tensor_parallelism_does_not_divide_is_refused_with_both_numbers():
    def refused(size: int, tensor: int, shape: GPTConfig = SHAPE) -> str:
        ranks = Ranks(0, size, None, None, CPU, 1.0, "forward", tensor)
        with pytest.raises(ValueError) as error:
            ranks.connect() if size % tensor else shard(GPT(shape), ranks, torch.float32)
        return str(error.value)

    assert "`tensor_parallel` is 2 but there are 3 processes" in refused(3, 2)
    assert "`tensor_parallel` is 4 but the model has 2 heads (n_head)" in refused(4, 4)
    assert "`tensor_parallel` is 2 but the model has 33 units of an MLP" in refused(2, 2, SHAPE.replace(n_inner=33))
    with pytest.raises(
        ValueError, match="`batch_size` is 3 but 2 groups of 2 processes share it; expected a multiple of 2"
    ):
        Ranks(0, 4, None, None, CPU, 1.0, "forward", 2).rows(3)
    with pytest.raises(ValueError, match="`tensor_parallel` is 2 but `parallel` is ddp"):
        RunOptions(parallel="ddp", tensor_parallel=2)
    with pytest.raises(ValueError, match="`tensor_parallel` is 2 but there is 1 process"):
        join(1.0, tensor=2)
