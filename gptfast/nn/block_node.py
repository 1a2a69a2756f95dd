"""The training forward of GPT-2's block as one node of autograd's graph.  B batch, T time, C channels, H heads, K heads of keys.

Module by module a block is four nodes written in Python and twenty of torch: on a small model their bookkeeping takes longer than
the kernels. Here the same kernels run in the same order, so that results and gradients have the same bits. What is not plainly
GPT-2's (other norms, rotary positions, adapters, a cache, packed texts, hooks, other classes) runs module by module.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptfast._schemas import AttentionOptions
from gptfast.backend import KERNEL_DTYPES, has_kernel, kernels, resolve
from gptfast.nn.attention import CausalSelfAttention
from gptfast.nn.layer_norm import LayerNorm
from gptfast.nn.linear import Linear
from gptfast.nn.mlp import MLP
from gptfast.nn.rms_norm import RMSNorm
from gptfast.ops._tensors import autocast_dtype, dtype_code, rows_of
from gptfast.ops.linear import GELUS, by_our_kernels, input_and_weight_gradients, unrecorded
from gptfast.ops.streams import stream

_NORMS, _LINEAR = (LayerNorm, RMSNorm), (Linear,)
_KINDS: tuple[Any, ...] = (_NORMS, _LINEAR, _LINEAR, _NORMS, _LINEAR, _LINEAR, (CausalSelfAttention,), (MLP,))
_FORWARDS = {kind: kind.forward for kinds in _KINDS for kind in kinds}
_OPS = ("layer_norm", "add_layer_norm", "causal_attention", "gelu")


class Plan(NamedTuple):
    """What the node does besides tensors. dtype: of what enters the products. heads: H, K and the size of one.
    dropout: p and seed of the residual dropouts; before, between: offsets of those before ln_1 and ln_2."""

    runs_on: str
    dtype: torch.dtype
    eps: tuple[float, float]
    tanh: bool
    heads: tuple[int, int, int]
    attention: AttentionOptions
    dropout: tuple[float, int]
    before: int
    between: int


def as_one_node(block: Any, branch: Tensor | None, residual: Tensor, rng: tuple[int, ...]) -> Any:
    """(branch, residual) of a pre-norm block, see `Block.forward`; None where it is to run module by module."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    parameters = _plain_parameters(block)
    if parameters is None or not _fit(block.attn, parameters, branch, residual):
        return None
    runs_on = resolve("layer_norm", None, residual)
    if runs_on == "eager" or not all(has_kernel(op, runs_on) for op in _OPS):
        return None
    plan, kind = _plan(block, runs_on, residual, rng), residual.device.type
    if not torch.is_autocast_enabled(kind):
        return _run(plan, branch, residual, *parameters)
    torch.set_autocast_enabled(kind, False)  # the node casts: torch need not ask for each product
    try:
        return _run(plan, branch, residual, *parameters)
    finally:
        torch.set_autocast_enabled(kind, True)


def plain_modules(block: Any) -> tuple[Any, ...] | None:
    """ln_1, c_attn, attn.c_proj, ln_2, c_fc, mlp.c_proj of a block, where they, its attention and its MLP are what `Block` makes
    of a config without experts, and have no hooks; else None."""
    inside = block._modules
    attn, mlp = inside["attn"], inside["mlp"]
    if type(attn) is not CausalSelfAttention or type(mlp) is not MLP or nn.modules.module._has_any_global_hook():
        return None
    of_attn, of_mlp = attn.__dict__["_modules"], mlp.__dict__["_modules"]
    c_attn, attn_out, c_fc, mlp_out = of_attn["c_attn"], of_attn["c_proj"], of_mlp["c_fc"], of_mlp["c_proj"]
    ordered = inside["ln_1"], c_attn, attn_out, inside["ln_2"], c_fc, mlp_out
    for module, kinds in zip((*ordered, attn, mlp), _KINDS, strict=True):
        own, kind = module.__dict__, type(module)
        hooked = (
            own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        )
        changed = kind not in kinds or kind.forward is not _FORWARDS[kind]
        if hooked or changed or "forward" in own or own.get("_compiled_call_impl") is not None:
            return None
    return ordered


def _plain_parameters(block: Any) -> tuple[Tensor | None, ...] | None:
    """Weight and bias of each of the plain modules; None where the block is not plainly GPT-2's."""
    ordered = plain_modules(block)
    if ordered is None:
        return None
    attn, mlp = block._modules["attn"], block._modules["mlp"]
    ln_1, c_attn, attn_out, ln_2, c_fc, mlp_out = ordered
    if type(ln_1) is not LayerNorm or type(ln_2) is not LayerNorm:
        return None
    if attn.rotary is not None or attn.q_norm is not None or attn.sinks is not None:
        return None
    activations = c_attn.activation, attn_out.activation, mlp_out.activation
    if activations != (None, None, None) or mlp.gated or c_fc.activation not in GELUS:
        return None
    found = [module.__dict__["_parameters"] for module in ordered]
    return tuple(parameters.get(name) for parameters in found for name in ("weight", "bias"))


def _fit(
    attn: CausalSelfAttention, parameters: tuple[Tensor | None, ...], branch: Tensor | None, residual: Tensor
) -> bool:
    """Whether all shapes, dtypes and devices are right: those of a float32 model, under autocast or not, or of another dtype."""
    dtype, device, shape, low = residual.dtype, residual.device, residual.shape, autocast_dtype(residual)
    if type(residual) is not Tensor or len(shape) != 3 or dtype not in KERNEL_DTYPES or 0 in shape:
        return False
    if low is not None and (dtype != torch.float32 or low not in KERNEL_DTYPES):
        return False
    if branch is not None:
        known = branch.dtype == dtype or branch.dtype == low
        if not known or type(branch) is not Tensor or branch.shape != shape or branch.device != device:
            return False
    C, of_heads, hidden = shape[2], attn.n_head * attn.head_dim, parameters[8]
    width = 0 if hidden is None else hidden.shape[0]
    of_qkv = of_heads + 2 * attn.kv_heads * attn.head_dim
    expected = (C,), (of_qkv, C), (C, of_heads), (C,), (width, C), (C, width)
    for weight, bias, size in zip(parameters[::2], parameters[1::2], expected, strict=True):
        if type(weight) is not nn.Parameter or weight.dtype != dtype or weight.device != device or weight.shape != size:
            return False
        if bias is None:
            continue
        if type(bias) is not nn.Parameter or bias.dtype != dtype or bias.device != device or bias.shape != size[:1]:
            return False
    return True


def _plan(block: Any, runs_on: str, residual: Tensor, rng: tuple[int, ...]) -> Plan:
    attn, (seed, offset, *row) = block.attn, rng
    p = block.resid_pdrop if block.training else 0.0
    q = attn.attn_pdrop if attn.training else 0.0
    first, T, H, D = row[0] if row else 0, residual.shape[1], attn.n_head, attn.head_dim

    def numbers(p: float, offset: int, each: int) -> tuple[int, int]:
        return stream("Block", seed, offset, True, first, each) if p > 0 else (0, 0)

    key, before = numbers(p, offset - 1, T)
    _, between = numbers(p, offset + 1, T)
    window, softcap = attn.window or 0, float(attn.softcap or 0)
    attention = AttentionOptions(
        None, None, attn.causal, D**-0.5, q, *numbers(q, offset, H), window, None, None, softcap
    )
    dtype = autocast_dtype(residual) or residual.dtype
    eps, tanh = (block.ln_1.eps, block.ln_2.eps), GELUS[block.mlp.c_fc.activation] == "tanh"
    return Plan(runs_on, dtype, eps, tanh, (H, attn.kv_heads, D), attention, (p, key), before, between)


class _BlockNode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, branch: Tensor | None, residual: Tensor, *parameters: Tensor) -> Any:
        w1, b1, wa, ba, wp, bp, w2, b2, wf, bf, wm, bm = parameters
        op, code, (p, seed) = kernels(plan.runs_on), KERNEL_DTYPES.index(plan.dtype), plan.dropout
        with torch._C._AutoDispatchBelowAutograd():
            if branch is None:
                y1, mean1, rstd1 = op.layer_norm_fwd(residual, w1, b1, plan.eps[0], code)
                total1 = residual
            else:
                options = (plan.eps[0], p, seed, plan.before, code)
                y1, total1, mean1, rstd1 = op.add_layer_norm_fwd(branch, residual, w1, b1, *options)
            qkv, wa = _product(plan, y1, wa, ba)
            attended, statistics = op.causal_attention_fwd(*_heads(plan, qkv), *plan.attention)
            a, wp = _product(plan, attended.transpose(1, 2).flatten(2), wp, bp)
            options = (plan.eps[1], p, seed, plan.between, code)
            y2, total2, mean2, rstd2 = op.add_layer_norm_fwd(a, total1, w2, b2, *options)
            inner, wf = _product(plan, y2, wf, None)
            g = op.gelu_fwd(inner, bf, plan.tanh)
            m, wm = _product(plan, g, wm, bm)
        first = (total1, w1, mean1, rstd1, y1, wa, qkv, attended, statistics, wp)
        ctx.save_for_backward(*first, total2, w2, mean2, rstd2, y2, wf, inner, bf, g, wm)
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.parameter_dtype = plan, w1.dtype
        ctx.codes = tuple(dtype_code(x) for x in (b1, b2, branch, residual, a, total1))
        return m, total2

    @staticmethod
    def backward(ctx: Any, dm: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dm is None and dtotal is None:
            return (None,) * 15
        if not torch.is_grad_enabled():
            return (None, *_gradients(ctx, dm, dtotal))
        with torch.no_grad():
            found = _gradients(ctx, dm, dtotal)
        return (None, *_ONCE(*(None if x is None else x.detach().requires_grad_() for x in found)))


_above: Any = super(torch.autograd.Function, _BlockNode)
_run = _above.apply  # `_BlockNode.apply` without what that does for torch.func
_functions: Any = torch._C._functions  # pyright: ignore[reportAttributeAccessIssue]
_ONCE = _functions.DelayedError(
    b"Block: double backward is not implemented by the fused kernels; use gptfast.backend('eager') for this part", 14
)


def _gradients(ctx: Any, dm: Tensor | None, dtotal: Tensor | None) -> list[Tensor | None]:
    """Of branch, residual and all parameters."""
    (total1, w1, mean1, rstd1, y1, wa, qkv, attended, statistics, wp, *second) = ctx.saved_tensors
    (total2, w2, mean2, rstd2, y2, wf, inner, bf, g, wm) = second
    plan, op, wanted = ctx.plan, kernels(ctx.plan.runs_on), ctx.needs_input_grad[3:]
    (p, seed), (bias1, bias2, of_branch, of_residual, of_a, of_total) = plan.dropout, ctx.codes
    to = ctx.parameter_dtype
    with torch._C._AutoDispatchBelowAutograd():
        dm = torch.zeros(g.shape[:-1] + wm.shape[:1], dtype=g.dtype, device=g.device) if dm is None else dm
        dg, dwm, dbm = _product_gradients(plan, dm, g, wm, wanted[10:], to)
        dinner, dbf = op.gelu_bwd(dg, inner, bf, plan.tanh)
        dy2, dwf, _ = _product_gradients(plan, dinner, y2, wf, (wanted[8], False), to)
        options = (bias2, of_a, of_total, p, seed, plan.between)
        da, dtotal1, dw2, db2 = op.add_layer_norm_bwd(dy2, dtotal, total2, w2, mean2, rstd2, *options)
        da = da if da.numel() else dtotal1  # empty where it would be the same
        dflat, dwp, dbp = _product_gradients(plan, da, attended.transpose(1, 2).flatten(2), wp, wanted[4:6], to)
        q, k, v = _heads(plan, qkv)
        dout = dflat.view(*dflat.shape[:2], *plan.heads[::2]).transpose(1, 2)
        dqkv = op.causal_attention_bwd(dout, q, k, v, attended, statistics, *plan.attention)[:3]
        dqkv = torch.cat([x.transpose(1, 2) for x in dqkv], 2).view(qkv.shape)
        dy1, dwa, dba = _product_gradients(plan, dqkv, y1, wa, wanted[2:4], to)
        if of_branch < 0:
            dbranch = None
            dresidual, dw1, db1 = op.layer_norm_bwd(dy1, total1, w1, mean1, rstd1, bias1)
            dresidual = dresidual + dtotal1
        else:
            options = (bias1, of_branch, of_residual, p, seed, plan.before)
            dbranch, dresidual, dw1, db1 = op.add_layer_norm_bwd(dy1, dtotal1, total1, w1, mean1, rstd1, *options)
            dbranch = dbranch if dbranch.numel() else dresidual
    of_norm1 = dw1, db1 if bias1 >= 0 else None
    of_norm2 = dw2, db2 if bias2 >= 0 else None
    of_mlp = dwf, None if bf is None else dbf, dwm, dbm
    return [dbranch, dresidual, *of_norm1, dwa, dba, dwp, dbp, *of_norm2, *of_mlp]


def _heads(plan: Plan, qkv: Tensor) -> tuple[Tensor, ...]:
    """q (B, H, T, D), k and v (B, K, T, D), views of (B, T, (H + 2 K) D)."""
    H, K, D = plan.heads
    return qkv.view(*qkv.shape[:2], H + 2 * K, D).transpose(1, 2).split((H, K, K), 1)


def _product(plan: Plan, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """x weight^T + bias as `gptfast.ops.linear` computes it, and the weight as its gradients read it."""
    if by_our_kernels(plan.runs_on, x):
        return unrecorded(x, weight, bias), weight
    weight = weight.to(x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)), weight


def _product_gradients(
    plan: Plan, dy: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...], to: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Of x, weight and bias. wanted: whether those of weight and bias are. to: their dtype."""
    of_weight, of_bias = wanted
    rows = rows_of(dy)
    if by_our_kernels(plan.runs_on, x):
        dx, dweight, dbias = input_and_weight_gradients(rows, rows_of(x), weight, True, of_weight, of_bias)
    else:  # as torch's own derivative has them
        dx = rows.mm(weight)
        dweight = rows.t().mm(rows_of(x)) if of_weight else dx
        dbias = rows.sum(0) if of_bias else dx
    return dx.view(x.shape), dweight.to(to) if of_weight else None, dbias.to(to) if of_bias else None
