"""The whole model: against transformers and eager re-computation with dropout; cache, torch.compile, errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import gptfast
from gptfast import ops
from gptfast.models import GPT, GPTConfig, KVCache
from gptfast.nn.position import sinusoids

V, T = 211, 37
SHAPE = {"n_layer": 3, "n_head": 3, "n_embd": 48, "block_size": 40, "vocab_size": V}
KINDS = {
    "gpt1": {"norm_position": "post", "final_norm": False},
    "gpt2": {},
    "gpt3": {"attention_pattern": "alternating", "window": 6},
    "sinusoidal": {"position_embedding": "sinusoidal", "bias": False, "activation": "gelu", "tie_weights": False},
    "post with final norm": {"norm_position": "post"},
    "pre without final norm": {"final_norm": False},
}


def make(kind: str, dropout: float = 0.0, scale: float = 3.0, **options) -> GPT:
    """A random model; `scale` times the usual weights, so that attention is far from uniform."""
    model = GPT(GPTConfig(**{**SHAPE, **KINDS[kind], "dropout": dropout, **options}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn_like(p) * 0.1 + 1
                if "ln_" in name and "weight" in name
                else torch.randn_like(p) * 0.02 * scale
            )
    return model


def batch(rows: int = 2, length: int = T) -> tuple[Tensor, Tensor]:
    ids = torch.randint(V, (rows, length + 1))
    targets = ids[:, 1:].clone()
    targets[0, :3] = -100
    return ids[:, :-1], targets


def grads_of(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


# ---- transformers ---------------------------------------------------------------------------------------------------


def hf_model(kind: str, tie: bool) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"n_layer": 3, "n_head": 3, "n_embd": 48, "n_positions": 40, "vocab_size": V}
    off = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": tie}
    ends = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **off, **ends))
    else:
        model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes, **off, **ends))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.1 + 1 if "ln_" in name and "weight" in name else torch.randn_like(p) * 0.06)
    return model


def in_our_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for name, x in tensors.items():
        name = name.removeprefix("transformer.")
        name = name.replace("tokens_embed", "wte").replace("positions_embed", "wpe")
        out[name] = x.t() if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else x
    return out


def with_weights_of(hf: torch.nn.Module, kind: str, tie: bool) -> GPT:
    model = GPT(GPTConfig(**SHAPE, **KINDS[kind], dropout=0.0, tie_weights=tie))
    model.load_state_dict({k: v.clone() for k, v in in_our_names(hf.state_dict()).items()})
    return model


def hf_loss(hf: torch.nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hf(ids).logits.flatten(0, 1), targets.flatten())


def assert_no_worse(ours: Tensor, theirs: Tensor, exact: Tensor, factor: float, what: str) -> None:
    """Error against fp64 at most `factor` times that of transformers in fp32, plus a few units in the last place."""
    floor = 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()
    error, allowed = ((x.double() - exact).abs().max().item() for x in (ours, theirs))
    assert error <= factor * allowed + floor, f"{what}: error {error:.2e}, transformers {allowed:.2e}"


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["gpt1", "gpt2"])
def test_logits_and_every_gradient_as_transformers(kind: str, tie: bool):
    hf = hf_model(kind, tie)
    ours, exact = with_weights_of(hf, kind, tie), copy.deepcopy(hf).double()
    ids, targets = batch()
    truth, theirs = exact(ids).logits, hf(ids).logits
    assert_no_worse(ours(ids), theirs, truth, 2, "logits")
    logits, loss = ours(ids, targets)
    assert logits is None
    assert_no_worse(loss, hf_loss(hf, ids, targets), hf_loss(exact, ids, targets), 2, "loss")
    got = grads_of(loss, ours)
    want, true = (in_our_names(grads_of(hf_loss(m, ids, targets), m)) for m in (hf, exact))
    assert got.keys() == want.keys()
    largest = max(g.abs().max().item() for g in true.values())
    for name, gradient in got.items():
        # the gradient of the keys' bias is 0 but for rounding, hence a floor that is common to all of them
        floor = 1e-6 * largest
        error, allowed = ((g.double() - true[name]).abs().max().item() for g in (gradient, want[name]))
        assert error <= 3 * allowed + floor, f"{name}: error {error:.2e}, transformers {allowed:.2e}"


@pytest.mark.parametrize("kind", ["gpt1", "gpt2"])
def test_ten_training_steps_as_transformers(kind: str):
    hf = hf_model(kind, tie=True)
    ours = with_weights_of(hf, kind, tie=True)
    start_of = {name: p.detach().clone() for name, p in ours.named_parameters()}
    batches = [batch(), batch()] * 5  # few, so that the loss falls

    def train(model: torch.nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        losses = []
        for ids, targets in batches:
            loss = loss_of(ids, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    theirs = train(hf, lambda ids, targets: hf_loss(hf, ids, targets))
    mine = train(ours, lambda ids, targets: ours(ids, targets)[1])
    assert abs(theirs[-1] - theirs[0]) > 0.05, "the steps changed nothing"
    assert mine == pytest.approx(theirs, rel=2e-5)
    reached = in_our_names(dict(hf.named_parameters()))
    for name, p in ours.named_parameters():
        start, got, want = start_of[name], p.detach(), reached[name].detach()
        if name.endswith("c_attn.bias"):  # Adam turns the rounding of the keys' zero gradient into full steps
            start, got, want = (x.view(3, -1)[[0, 2]] for x in (start, got, want))
        assert (got - want).norm() < 1e-3 * (want - start).norm(), name


# ---- dropout: eager re-computation with the masks -------------------------------------------------------------------


def recompute(model: GPT, ids: Tensor, targets: Tensor, step: int, seed: int) -> Tensor:
    """The loss in plain torch, with the masks that the contract says."""
    c, numbers = model.config, iter(range(step * (1 + 3 * model.config.n_layer), 2**32))
    B, H, D = ids.shape[0], c.n_head, c.head_dim

    def drop(x: Tensor, p: float, offset: int, matrices: int = 1) -> Tensor:
        t = round(p * 65536)
        mask = ops.dropout_mask(
            (matrices, x.numel() // x.shape[-1] // matrices, x.shape[-1]), p, seed=seed, offset=offset
        )
        return x * mask.view(x.shape) * (65536 / (65536 - t))

    def attention(module, x: Tensor) -> Tensor:
        q, k, v = module.c_attn(x).view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
        i, j = torch.arange(T)[:, None], torch.arange(T)
        seen = (j <= i) & (j > i - (module.window or T))
        probs = (q @ k.mT * D**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        probs = drop(probs, c.attn_pdrop, next(numbers), B * H)
        return drop(module.c_proj((probs @ v).transpose(1, 2).flatten(2)), c.resid_pdrop, next(numbers))

    def mlp(module, x: Tensor) -> Tensor:
        h = F.gelu(
            F.linear(x, module.c_fc.weight, module.c_fc.bias), approximate="tanh" if "tanh" in c.activation else "none"
        )
        return drop(module.c_proj(h), c.resid_pdrop, next(numbers))

    def norm(module, x: Tensor) -> Tensor:
        return F.layer_norm(x, (c.n_embd,), module.weight, module.bias, c.layer_norm_epsilon)

    scale = 48**0.5 if c.position_embedding == "sinusoidal" else 1
    x = drop(model.wte.weight[ids] * scale + model.wpe.weight[:T], c.embd_pdrop, next(numbers))
    for block in model.h:
        if c.norm_position == "pre":
            x = x + attention(block.attn, norm(block.ln_1, x))
            x = x + mlp(block.mlp, norm(block.ln_2, x))
        else:
            x = norm(block.ln_1, x + attention(block.attn, x))
            x = norm(block.ln_2, x + mlp(block.mlp, x))
    x = x if model.ln_f is None else norm(model.ln_f, x)
    return F.cross_entropy((x @ model.lm_head.weight.T).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rates", [(0.0, 0.0, 0.0), (0.1, 0.2, 0.3), (0.0, 0.0, 0.25), (0.25, 0.0, 0.0)], ids=str)
def test_training_equals_eager_recomputation_with_the_masks(kind: str, rates: tuple[float, float, float]):
    embd, attn, resid = rates
    model = make(kind, embd_pdrop=embd, attn_pdrop=attn, resid_pdrop=resid, dropout=None)
    model.dropout_seed, model.dropout_step = 12345678901234567890, 41
    for step in (41, 42):
        ids, targets = batch()
        _, loss = model(ids, targets)
        expected = recompute(model, ids, targets, step, model.dropout_seed)
        torch.testing.assert_close(loss, expected, rtol=2e-5, atol=0)
        got, want = grads_of(loss, model), grads_of(expected, model)
        largest = max(g.abs().max() for g in want.values())
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=3e-6 * largest.item(), msg=name)
    assert model.dropout_step == (43 if any(rates) else 41)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_path_equals_the_eager_backend(kind: str):
    model, (ids, targets) = make(kind, dropout=0.2), batch()
    eager = copy.deepcopy(model)
    model.dropout_seed = eager.dropout_seed = 6
    with gptfast.backend("eager"):
        _, want = eager(ids, targets)
        wanted = grads_of(want, eager)
        want_logits = eager.eval()(ids)
    _, got = model(ids, targets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    largest = max(g.abs().max() for g in wanted.values()).item()
    for name, g in grads_of(got, model).items():
        torch.testing.assert_close(g, wanted[name], rtol=1e-3, atol=3e-6 * largest, msg=name)
    torch.testing.assert_close(model.eval()(ids), want_logits, rtol=1e-4, atol=1e-5)


def test_dropout_state_restores_the_masks():
    model, (ids, targets) = make("gpt2", dropout=0.5), batch()
    model.dropout_seed = 0
    losses = [model(ids, targets)[1].item() for _ in range(3)]
    assert len(set(losses)) == 3
    model.dropout_step = 1
    assert model(ids, targets)[1].item() == losses[1]
    model.dropout_step, model.dropout_seed = 1, 9
    assert model(ids, targets)[1].item() not in losses
    model.eval()
    assert model(ids, targets)[1].item() == model(ids, targets)[1].item()
    assert model.dropout_step == 2, "evaluation must not advance it"


# ---- the interface --------------------------------------------------------------------------------------------------


def test_what_a_call_returns():
    model, (ids, targets) = make("gpt2"), batch()
    logits = model(ids)
    assert logits.shape == (2, T, V)
    assert torch.equal(model(ids.int()), logits)
    torch.testing.assert_close(model(ids, last_only=True), logits[:, -1])
    none, loss = model(ids, targets)
    assert none is None
    given, same_loss = model.eval()(ids, targets)
    torch.testing.assert_close(given, logits)
    torch.testing.assert_close(loss, same_loss)
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), targets.flatten()), rtol=1e-5, atol=0)


def test_initial_weights():
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=128, vocab_size=500))
    state = model.state_dict()
    for name, x in state.items():
        if name.endswith("bias"):
            assert not x.any(), name
        elif "ln_" in name:
            assert (x == 1).all(), name
        else:
            expected = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 4 = sqrt(2 * 8)
            assert x.std().item() == pytest.approx(expected, rel=0.05), name
    assert model.lm_head.weight is model.wte.weight
    names = {n.replace("h.0.", "") for n in state if n.startswith("h.0.")}
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    assert names == {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert {n for n in state if not n.startswith("h.")} == {
        *("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias", "lm_head.weight")
    }


def test_sinusoids_are_those_of_the_paper_and_not_stored():
    model = make("sinusoidal")
    pos, i = 17, 5
    assert model.wpe.weight[pos, 2 * i].item() == pytest.approx(
        torch.sin(torch.tensor(17 / 10000 ** (10 / 48))).item(), abs=1e-6
    )
    assert model.wpe.weight[pos, 2 * i + 1].item() == pytest.approx(
        torch.cos(torch.tensor(17 / 10000 ** (10 / 48))).item(), abs=1e-6
    )
    assert "wpe.weight" not in model.state_dict()
    assert make("sinusoidal", n_head=1, n_embd=7).wpe.weight.shape == (40, 7)


def test_flops_per_token():
    from torch.utils.flop_counter import FlopCounterMode

    model = make("gpt3").eval()
    with FlopCounterMode(display=False) as counter, gptfast.backend("eager"), torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.int64))
    assert model.flops_per_token(1, training=False) == counter.get_total_flops()
    assert model.flops_per_token(1) == 3 * counter.get_total_flops()
    keys = sum((t + 1) * 2 + min(t + 1, 6) for t in range(30)) / 30  # layers 0 and 2 dense, layer 1 banded
    grown = model.flops_per_token(30, training=False) - model.flops_per_token(1, training=False)
    assert grown == pytest.approx(4 * 48 * (keys - 3))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_autocast(dropout: float):
    model, (ids, targets) = make("gpt2", dropout=dropout, scale=1.0), batch()
    model.dropout_seed = 0
    _, full = model(ids, targets)
    model.dropout_step = 0
    with torch.autocast("cpu", torch.bfloat16):
        _, half = model(ids, targets)
        assert model.eval()(ids).dtype == torch.bfloat16
    assert half.item() == pytest.approx(full.item(), rel=5e-3)
    want, got = grads_of(full, model), grads_of(half, model)
    for name, g in got.items():
        assert g.dtype == torch.float32
        error = (g - want[name]).norm() / (want[name].norm() + 1e-4)
        assert error < 0.05, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype: torch.dtype):
    model, (ids, targets) = make("gpt3", scale=1.0), batch()
    want = model(ids, targets)[1].item()
    model.to(dtype)
    assert model(ids).dtype == dtype
    _, loss = model(ids, targets)
    assert loss.item() == pytest.approx(want, rel=1e-2)
    grads_of(loss, model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt1", "gpt3"])
def test_compiled_training_makes_one_graph_for_all_steps(kind: str):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model = make(kind, dropout=0.2, n_layer=2)
    eager = copy.deepcopy(model)
    model.dropout_seed = eager.dropout_seed = 2**64 - 3
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(5):
        ids, targets = batch()
        (_, got), (_, want) = compiled(ids, targets), eager(ids, targets)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        wanted = grads_of(want, eager)
        for name, g in grads_of(got, model).items():
            torch.testing.assert_close(g, wanted[name], rtol=1e-5, atol=1e-7, msg=name)
    assert model.dropout_step == 5
    assert counters["stats"]["unique_graphs"] <= 2, "the dropout step must not recompile the model"


# ---- cache ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cache_in_chunks_equals_one_pass(kind: str):
    model = make(kind).eval()
    ids, _ = batch(3)
    full, cache, start = model(ids), KVCache(model.config, 3), 0
    for length in (5, 1, 1, 9, 1, 20):
        part = ids[:, start : start + length]
        torch.testing.assert_close(model(part, cache=cache), full[:, start : start + length], rtol=1e-4, atol=1e-5)
        start += length
    assert cache.lengths.tolist() == [T] * 3
    cache.lengths = torch.full((3,), 10)
    torch.testing.assert_close(model(ids[:, 10:12], cache=cache, last_only=True), full[:, 11], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt1", "gpt2", "gpt3"])
@pytest.mark.parametrize("chunk", [1, 2])
def test_cache_with_rows_of_different_length(kind: str, chunk: int):
    """Right-padded prompts; what lies behind the true length is overwritten and never seen."""
    model = make(kind).eval()
    lengths, ids = [3, 11, 7], batch(3)[0]
    cache = KVCache(model.config, 3, max_len=25)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    model(ids[:, :11], cache=cache)
    cache.lengths = torch.tensor(lengths)
    for _ in range(4):
        new = torch.stack([ids[b, n : n + chunk] for b, n in enumerate(lengths)])
        logits = model(new, cache=cache)
        for b, n in enumerate(lengths):
            alone = model(ids[b : b + 1, : n + chunk])[0, n:]
            torch.testing.assert_close(logits[b], alone, rtol=1e-4, atol=1e-5)
        lengths = [n + chunk for n in lengths]
    assert cache.lengths.tolist() == lengths


def test_cache_stores_its_own_dtype_and_no_graph():
    model, ids = make("gpt2").eval(), batch()[0]
    cache = KVCache(model.config, 2, dtype=torch.bfloat16)
    logits = model(ids, cache=cache)
    assert not logits.requires_grad
    assert not cache.k.requires_grad
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(ids).detach(), rtol=0, atol=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids[:, :2], cache=KVCache(model.config, 2))


# ---- errors ---------------------------------------------------------------------------------------------------------

IDS = torch.zeros(2, 5, dtype=torch.int64)


def bad(value: int) -> Tensor:
    ids = IDS.clone()
    ids[1, 3] = value
    return ids


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((bad(V),), ValueError, rf"ids holds token id {V}; expected ids in \[0, {V}\)"),
        ((bad(-1),), ValueError, "ids holds token id -1"),
        ((bad(-100),), ValueError, "ids holds token id -100"),
        ((IDS, bad(V + 7)), ValueError, f"targets holds token id {V + 7}"),
        (
            (IDS, bad(-1)),
            ValueError,
            rf"targets holds -1; expected ids in \[0, {V}\), or -100 where .* ignore_index=-1 says",
        ),
        ((IDS.float(),), TypeError, "ids has dtype torch.float32; expected a tensor of token ids, int64 or int32"),
        (([[1, 2]],), TypeError, "ids is a list"),
        ((IDS, IDS.int()), TypeError, "targets has dtype torch.int32"),
        ((IDS[0],), ValueError, r"ids has shape \(5,\); expected \(B, T\) - use ids\[None\]"),
        ((IDS[:, :0],), ValueError, r"ids holds no tokens \(T = 0\)"),
        ((IDS.repeat(1, 9),), ValueError, "ids has 45 positions but block_size is 40; keep the last 40"),
        ((IDS, IDS[:, 1:]), ValueError, r"targets has shape \(2, 4\) and ids \(2, 5\)"),
    ],
)
def test_wrong_input_is_named(args: tuple, error: type[Exception], message: str):
    with pytest.raises(error, match=f"GPT: {message}"):
        make("gpt2")(*args)


def test_wrong_use_of_a_cache_is_named():
    model = make("gpt2")
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\)"):
        model(IDS, cache=KVCache(model.config, 2))
    model.eval()
    with pytest.raises(ValueError, match="ids has 2 rows but the cache 3"):
        model(IDS, cache=KVCache(model.config, 3))
    cache = KVCache(model.config, 2, max_len=7)
    model(IDS, cache=cache)
    with pytest.raises(ValueError, match="5 positions are filled and 3 more do not fit into max_len = 7"):
        model(IDS[:, :3], cache=cache)
    with pytest.raises(ValueError, match="max_len is 41; expected 1 to block_size = 40"):
        KVCache(model.config, 2, max_len=41)
    with pytest.raises(ValueError, match="batch_size is 0"):
        KVCache(model.config, 0)
    with pytest.raises(TypeError, match="GPT: config is a dict; expected a GPTConfig"):
        GPT({"n_layer": 2})  # type: ignore[arg-type]


def test_sinusoids_are_the_formula_and_take_no_more_memory_than_their_table():
    """Positions are computed some at a time: a large block_size of a config.json took eight times its table in fp64."""
    positions, channels = 3 * 4096 + 5, 7
    t, i = torch.arange(positions, dtype=torch.float64)[:, None], torch.arange(channels, dtype=torch.float64)
    angle = t * torch.exp(-math.log(10000.0) * (i // 2 * 2) / channels)
    assert torch.equal(sinusoids(positions, channels), torch.where(i % 2 == 0, angle.sin(), angle.cos()).float())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        sinusoids(1 << 20, 8)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * 8 << 20
