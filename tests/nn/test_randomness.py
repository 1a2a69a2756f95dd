"""Dropout under PyTorch's tools for randomness: seeds, states, checkpointing, copies, workers, ranks, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import gptfast
import gptfast.nn as gnn
from gptfast import ops
from gptfast.models import GPT, GPTConfig
from gptfast.ops import streams

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=30, dropout=0.4)
P = 0.4


class Functions(torch.nn.Module):
    """The functions without a seed."""

    def forward(self, x: Tensor) -> Tensor:
        q = x.view(2, 8, 2, 8).transpose(1, 2)
        y = ops.causal_attention(q, q, q, dropout_p=P).transpose(1, 2).reshape(2, 8, 16)
        y, total = ops.add_layer_norm(y, x, torch.ones(16), dropout_p=P)
        return ops.dropout(y + total, P)


class Losses(GPT):
    """A whole model: the embedded input is added, so that it has a gradient too."""

    def forward(self, x: Tensor) -> Tensor:
        ids = torch.arange(16).view(2, 8)
        return x + super().forward(ids, ids)[1]


KINDS = {
    "dropout": lambda: gnn.Dropout(P),
    "attention": lambda: gnn.CausalSelfAttention(CONFIG),
    "block": lambda: gnn.Block(CONFIG),
    "post-norm": lambda: gnn.Block(CONFIG.replace(norm_position="post")),
    "gpt": lambda: Losses(CONFIG),
    "functions": Functions,
}


def seed_everything(module: torch.nn.Module, seed: int | None) -> None:
    """torch's generator, and with `seed` also the modules'."""
    torch.manual_seed(0)
    if seed is not None:
        gnn.seed_dropout(module, seed)
        for part in module.modules():
            if isinstance(part, GPT):
                part.dropout_seed, part.dropout_step = seed, 0


def forwards(module: torch.nn.Module, n: int = 2) -> list[Tensor]:
    x = torch.linspace(-1, 2, 256).view(2, 8, 16)
    with torch.no_grad():
        return [module(x) for _ in range(n)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor]) -> None:
    """Up to the order in which several calls' gradients are added; another mask changes them by their own size."""
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))


def disjoint(a: list[Tensor], b: list[Tensor]) -> bool:
    return not any(torch.equal(x, y) for x in a for y in b)


# ---- activation checkpointing ---------------------------------------------------------------------------------------


def gradients(module: torch.nn.Module, seed: int | None, run: Any, calls: int = 3) -> list[Tensor]:
    """Of the input and all parameters, after several forwards and one backward."""
    seed_everything(module, seed)
    x = torch.linspace(-1, 2, 256).view(2, 8, 16).requires_grad_()
    total = torch.zeros(())
    for _ in range(calls):
        y = run(module, x)
        total = total + (y * y).sum()
    module.zero_grad()
    total.backward()
    return [x.grad, *(p.grad for p in module.parameters())]


def nested(module: torch.nn.Module, x: Tensor, use_reentrant: bool) -> Tensor:
    def inner(y: Tensor) -> Tensor:
        return checkpoint(module, module(y), use_reentrant=use_reentrant)

    return checkpoint(inner, x, use_reentrant=use_reentrant)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the inner of two reentrant ones
@pytest.mark.parametrize("seed", [None, 2**64 - 5], ids=["drawn", "counted"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind: str, use_reentrant: bool, seed: int | None) -> None:
    module = KINDS[kind]()
    for calls in (1, 3):
        want = gradients(module, seed, lambda m, x: m(x), calls)
        got = gradients(module, seed, lambda m, x: checkpoint(m, x, use_reentrant=use_reentrant), calls)
        if calls == 1:
            assert same(got, want)
        close(got, want)
    want = gradients(module, seed, lambda m, x: m(m(x)))
    close(gradients(module, seed, lambda m, x: nested(m, x, use_reentrant)), want)


@pytest.mark.parametrize("seed", [None, 3], ids=["drawn", "counted"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_sequential_checkpointing_changes_no_gradient(use_reentrant: bool, seed: int | None) -> None:
    stack = torch.nn.Sequential(*(gnn.Block(CONFIG) for _ in range(4)))
    want = gradients(stack, seed, lambda m, x: m(x), 1)
    got = gradients(stack, seed, lambda m, x: checkpoint_sequential(m, 2, x, use_reentrant=use_reentrant), 1)
    assert same(got, want)


def test_a_second_backward_recomputes_the_same_masks() -> None:
    for seed in (None, 4):
        module = gnn.Dropout(P, seed=seed)
        x = torch.ones(64, requires_grad=True)
        y = checkpoint(lambda z, drop=module: drop(z) * z, x, use_reentrant=False)
        first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, 2 * y)
        assert torch.equal(second, first)


def test_a_counter_that_cannot_know_the_call_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    module = gnn.Dropout(P, seed=4)
    x = torch.ones(64, requires_grad=True)

    def backward(*states: int, **options: Any) -> None:
        losses = []
        for state in states:
            torch.manual_seed(state)
            losses.append(checkpoint(lambda z: module(z) * z, x, use_reentrant=False, **options).sum())
        torch.stack(losses).sum().backward()

    backward(1, 2)
    with pytest.raises(RuntimeError, match="mask of seed 4, but two calls had the same state"):
        backward(3, 3)
    with pytest.raises(RuntimeError, match=r"mask of seed 4, but none of the last 4096 .*leave the seed out"):
        backward(5, preserve_rng_state=False)
    module = gnn.Dropout(P, seed=4)
    monkeypatch.setattr(streams, "REMEMBERED", 2)
    with pytest.raises(RuntimeError, match="none of the last 2 calls"):
        backward(6, 7, 8)


# ---- torch.manual_seed, fork_rng and states -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_generator_decides(kind: str) -> None:
    torch.manual_seed(1)
    module = KINDS[kind]()
    torch.manual_seed(5)
    first = forwards(module)
    assert disjoint(first[:1], first[1:])
    torch.manual_seed(5)
    assert same(forwards(module), first)
    torch.manual_seed(6)
    assert disjoint(forwards(module), first)

    state = torch.get_rng_state()
    wanted = forwards(module)
    torch.set_rng_state(state)
    with torch.random.fork_rng():
        forwards(module, 5)
    assert same(forwards(module), wanted), "fork_rng let the inner stream out"


def test_nothing_is_drawn_where_nothing_drops() -> None:
    torch.manual_seed(1)
    state, x = torch.get_rng_state(), torch.ones(2, 8, 16)
    config = CONFIG.replace(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, dropout=None)
    modules = [gnn.Dropout(0.0), gnn.Block(config), gnn.CausalSelfAttention(config)]
    modules += [KINDS[kind]().eval() for kind in ("dropout", "attention", "block", "gpt")]
    torch.set_rng_state(state)
    for module in modules:
        module(x)
    ops.dropout(x, 0.0)
    ops.dropout(x, 0.5, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_functions_without_a_seed_draw_one(backend: str) -> None:
    x = torch.ones(2, 2, 8, 16)
    calls = {
        "dropout": lambda **key: ops.dropout(x, 0.5, backend=backend, **key),
        "causal_attention": lambda **key: ops.causal_attention(x, x, x, dropout_p=0.5, backend=backend, **key),
        "add_layer_norm": lambda **key: ops.add_layer_norm(x, x, x[0, 0, 0], dropout_p=0.5, backend=backend, **key)[1],
    }
    for name, call in calls.items():
        torch.manual_seed(2)
        a, b = call(), call()
        assert not torch.equal(a, b), name
        torch.manual_seed(2)
        assert torch.equal(call(), a), name
        torch.manual_seed(2)
        assert torch.equal(call(seed=streams.draw_seed()), a), name
        assert torch.equal(call(seed=3, offset=1), call(seed=3, offset=1)), name


def test_defaults_of_others_do_not_reach_the_draw() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    module, x = gnn.Dropout(P), torch.ones(64)
    torch.manual_seed(3)
    wanted = module(x)
    for device, dtype in (("meta", torch.float16), ("cpu", torch.float64)):
        torch.manual_seed(3)
        with torch.device(device), torch.inference_mode():
            torch.set_default_dtype(dtype)
            try:
                got = module(x)
            finally:
                torch.set_default_dtype(torch.float32)
        assert torch.equal(got, wanted)
    with FakeTensorMode() as mode:
        assert module(mode.from_tensor(x)).shape == (64,)
    torch.manual_seed(3)
    with gptfast.backend("eager"):
        assert torch.equal(torch.func.grad(lambda y: module(y).sum())(x), wanted)


# ---- copies, processes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 8], ids=["drawn", "counted"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "functions"])
def test_copies_are_streams_of_their_own(kind: str, seed: int | None) -> None:
    module = KINDS[kind]()
    seed_everything(module, seed)
    twins = [copy.deepcopy(module) for _ in range(2)]
    outputs = [forwards(m, 1) for m in (module, *twins)]
    for n in range(3):
        assert disjoint(outputs[n], outputs[n - 1])
    seed_everything(module, seed)
    twins = [copy.deepcopy(module) for _ in range(2)]
    assert all(map(same, [forwards(m, 1) for m in (module, *twins)], outputs)), "torch.manual_seed decides copies too"


def test_pickled_modules_continue_at_the_same_offset() -> None:
    for kind in ("block", "gpt"):
        module = KINDS[kind]()
        seed_everything(module, 6)
        forwards(module)
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        stored = [torch.load(buffer, weights_only=False), pickle.loads(pickle.dumps(module))]
        wanted = forwards(module)
        assert all(same(forwards(m), wanted) for m in stored)


@pytest.mark.parametrize("seed", [None, 3], ids=["drawn", "counted"])
def test_layers_of_a_transformer_encoder_differ(seed: int | None) -> None:
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    layer.dropout1 = gnn.Dropout(0.5, seed=seed)
    seen = []
    encoder = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    for copied in encoder.layers:
        copied.dropout1.register_forward_hook(lambda _m, args, out: seen.append((out != 0) | (args[0] == 0)))
    encoder(torch.randn(2, 8, 16))
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 4


class Noise(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.drop = gnn.Dropout(0.5)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([self.drop(torch.ones(32)), ops.dropout(torch.ones(32), 0.5)])


def test_workers_of_a_data_loader_differ() -> None:
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads
        rows, other = (
            [tuple(r.tolist()) for r in torch.utils.data.DataLoader(Noise(), 1, num_workers=2)] for _ in "ab"
        )
        torch.manual_seed(4)
        again = [tuple(r.flatten().tolist()) for r in torch.utils.data.DataLoader(Noise(), 1, num_workers=2)]
    rows, other = ([sum(map(tuple, r), ()) for r in found] for found in (rows, other))
    assert len({*rows, *other}) == 8
    assert again == rows


RANK = """
import sys, torch, gptfast, gptfast.nn as gnn
from gptfast import ops
rank, file = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
torch.manual_seed(0)
x, ids = torch.ones(64), torch.arange(8)[None]
model = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, vocab_size=30, dropout=0.5))
stack = torch.nn.Sequential(gnn.Dropout(0.5), gnn.Dropout(0.5))
made = [gnn.Dropout(0.5)(x), model(ids, ids)[1].detach()[None], ops.dropout(x, 0.5)]
gnn.seed_dropout(stack, 3)
made += [stack[0](x), stack[1](x)]
mine = torch.cat([*made, gnn.Dropout(0.5, seed=7)(x)])
other = [torch.empty_like(mine) for _ in range(2)]
torch.distributed.all_gather(other, mine)
other = other[1 - rank]
sizes = [len(t) for t in made] + [64]
parts = list(zip(mine.split(sizes), other.split(sizes)))
print([torch.equal(a, b) for a, b in parts], torch.equal(parts[3][1], parts[4][0]))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_with_one_seed_differ(tmp_path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "rendezvous")], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in ranks:
        assert process.communicate(timeout=240)[0].strip() == "[False, False, False, False, False, True] False"


# ---- the counters ---------------------------------------------------------------------------------------------------


def test_a_model_whose_step_is_set_counts_from_there() -> None:
    model = Losses(CONFIG)
    assert model.dropout_seed is None
    assert model.dropout_step is None
    torch.manual_seed(7)
    model.dropout_step = 2
    seed, losses = model.dropout_seed, forwards(model, 3)
    assert model.dropout_step == 5
    other = copy.deepcopy(model)
    other.dropout_seed, other.dropout_step = seed, 2
    assert same(forwards(other, 3), losses), "the two integers restore the dropout"
    model.dropout_seed, model.dropout_step = None, None
    torch.manual_seed(1)
    drawn = forwards(model)
    torch.manual_seed(1)
    assert same(forwards(model), drawn)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("dropout_seed", 2**64, ValueError, r"seed is 18446744073709551616; expected 0 <= seed < 2\*\*64"),
        ("dropout_seed", 1.5, TypeError, "seed is 1.5"),
        ("dropout_step", -1, ValueError, "offset is -1"),
    ],
)
def test_bad_counters_are_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        setattr(GPT(CONFIG), name, value)
    model = GPT(CONFIG)
    model.dropout_seed = 3
    with pytest.raises(TypeError, match="offset is None beside the seed 3"):
        model.dropout_step = None


# ---- torch.compile --------------------------------------------------------------------------------------------------


def compiled(function: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dropout", "block", "gpt", "functions"])
def test_compiled_modules_draw_what_eager_draws(kind: str) -> None:
    from torch._dynamo.utils import counters

    module = KINDS[kind]()
    counters.clear()
    fast = compiled(module)
    for seed in (None, 2**64 - 5):
        if seed is not None and kind == "functions":
            continue
        want = gradients(module, seed, lambda m, x: m(x))
        close(gradients(module, seed, lambda m, x: fast(x)), want)
        got = gradients(module, seed, lambda m, x: checkpoint(fast, x, use_reentrant=False))
        close(got, want)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_a_checkpoint_inside_of_a_compiled_region() -> None:
    pair = torch.nn.Sequential(gnn.Dropout(0.5), gnn.Dropout(0.5))
    x = torch.ones(400, requires_grad=True)
    fast = compiled(lambda z: checkpoint(lambda u: pair(u) * ops.dropout(u, 0.5) * u, z, use_reentrant=False))
    for seed in (None, 3):
        seed_everything(pair, seed)
        y = fast(x)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 3 * y)
        assert 20 < (y != 0).sum() < 80, "the three dropouts of one graph are independent: 400 / 8 = 50"


@pytest.mark.slow
def test_compiled_layers_share_a_graph() -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    layers = [torch.compile(gnn.Block(CONFIG), fullgraph=True, backend="aot_eager") for _ in range(5)]
    x = torch.randn(2, 8, 16)
    for layer in layers:
        x = layer(x)
    assert counters["stats"]["unique_graphs"] <= 2
