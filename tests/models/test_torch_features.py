"""GPT under what PyTorch does with any module: compiled and exported with other lengths, packaged, profiled, on two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from gptfast import GPT, GPTConfig

V, T = 61, 64


def make(n_layer: int = 2) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(n_layer=n_layer, n_head=2, n_embd=32, vocab_size=V, block_size=T, dropout=0.0))


def ids_of(rows: int, length: int) -> Tensor:
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.slow
def test_one_compilation_serves_every_length():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = make(n_layer=1), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    made = []
    for length in (16, T, 17, 40):
        ids = ids_of(2, length)
        torch.testing.assert_close(compiled(ids, ids)[1], model(ids, ids)[1])
        made.append(counter.frame_count)
    assert len(set(made)) == 1, made


@pytest.mark.slow
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_an_exported_program_takes_other_lengths(grad: bool):
    """Also where gradients are on, as by default: the products write into their result, which autograd must not see."""
    model = make().eval()
    program = torch.export.export(model, (ids_of(2, 16),), dynamic_shapes=({1: torch.export.Dim("T", min=2, max=T)},))
    with torch.set_grad_enabled(grad):
        for length in (2, 33, T):
            ids = ids_of(2, length)
            torch.testing.assert_close(program.module()(ids), model(ids))


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_training_graph_has_a_backward(strict: bool):
    model, ids = make(), ids_of(2, 24)
    expected = model(ids, ids)[1]
    expected.backward()
    exported = torch.export.export(make(), (ids, ids), strict=strict)
    assert not [node for node in exported.graph.nodes if "autograd" in str(node.target)]
    program = exported.module()
    loss = program(ids, ids)[1]
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    loss.backward()
    found = dict(program.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_a_package_of_compiled_code_takes_other_lengths(tmp_path: Path):
    model = make(n_layer=1).eval()
    compiler = torch._inductor.config.patch({"cpp.cxx": (None, "g++")})  # one word, which $CXX need not be
    with torch.no_grad(), compiler:
        dim = torch.export.Dim("T", min=2, max=T)
        program = torch.export.export(model, (ids_of(2, 16),), dynamic_shapes=({1: dim},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "gpt.pt2"))
        packaged = torch._inductor.aoti_load_package(path)
        for length in (5, 33):
            ids = ids_of(2, length)
            torch.testing.assert_close(packaged(ids), model(ids))


def test_a_profile_names_the_ops():
    model, ids = make(), ids_of(2, 32)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        model(ids, ids)[1].backward()
    names = {event.key for event in profiled.key_averages()}
    ops = ("causal_attention", "layer_norm", "add_layer_norm", "gelu")
    assert {f"gptfast::{op}_{way}" for op in ops for way in ("fwd", "bwd")} <= names
    assert {"gptfast::embedding_fwd", "gptfast::embedding_bwd", "gptfast::linear_cross_entropy_total"} <= names
    assert any(name.startswith("gptfast::") and ("gemm" in name or "linear_fwd" in name) for name in names)


# ---- two processes ---------------------------------------------------------------------------------------------------


def _wrapped(way: str, model: GPT) -> Any:
    if way == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for block in model.h:
        fully_shard(block)
    return fully_shard(model)


def _work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        for way in ("ddp", "fsdp2"):
            model = make()
            found = _steps(model, _wrapped(way, model), ids_of(4, 24)[2 * rank : 2 * rank + 2])
            dist.all_reduce(found["losses"])
            whole = {n: x.full_tensor() if hasattr(x, "full_tensor") else x for n, x in found.items()}
            if rank == 0:
                torch.save(whole | {"losses": whole["losses"] / 2}, Path(folder) / way)
    finally:
        dist.destroy_process_group()


def _steps(model: GPT, called: Any, ids: Tensor) -> dict[str, Any]:
    """Losses, weights and gradients of two steps."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(2):
        loss = called(ids, ids)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    found: dict[str, Any] = {"losses": torch.stack(losses)}
    for name, parameter in model.named_parameters():
        found |= {name: parameter.detach(), f"gradient of {name}": parameter.grad}
    return found


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path: Path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    model = make()
    expected = _steps(model, model, ids_of(4, 24))
    for way in ("ddp", "fsdp2"):
        found = torch.load(tmp_path / way)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=f"{way}: {name}")
