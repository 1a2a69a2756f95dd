"""The CUDA attention kernels on the emulator, beyond the op's own tests: every mode, both generations of GPU, long rows,
packed or misaligned inputs, repetition."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.testing import DTYPES, cases, check_case, run
from tests.support import emulated
from tests.support.attention_cases import FEW_QUERIES, LONG, MODE_CASES, attention
from tests.support.op_properties import bitwise, check_pure

MODES = [("forward", True), ("forward", False), ("reverse", True), ("random", True), ("random", False)]
OLDER_GPU = 99 << 10  # bytes of shared memory a block: that of sm_86 and sm_89, too little for the Hopper kernels
HALVES = [pytest.param(DTYPES[n], id=n) for n in ("bf16", "fp16")]
# Kernels of fp32 are the same on both GPUs: they run on the older one, into whose shared memory they must fit.
GPUS = [
    pytest.param(smem, DTYPES[n], id=f"{gpu}-{n}")
    for gpu, smem, names in (("hopper", 0, ("bf16", "fp16")), ("older", OLDER_GPU, DTYPES))
    for n in names
]


@pytest.mark.parametrize(("smem", "dtype"), GPUS)
@pytest.mark.parametrize("case", LONG, ids=lambda c: c.id)
def test_long_rows(case, smem, dtype, emu):
    emulated.configure(smem=smem)
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("case", [c for c in cases("causal_attention") if c.dims["D"] in (64, 128)], ids=lambda c: c.id)
def test_older_gpus(case, dtype, emu):
    """What Hopper takes on itself, on the kernels for every GPU."""
    emulated.configure(smem=OLDER_GPU)
    check_case(case, dtype, seed=1)


@pytest.mark.parametrize(
    ("gpu", "on_hopper"),
    [({}, True), ({"smem": OLDER_GPU}, False), ({"hopper_code": False}, False), ({"maps": False}, False)],
    ids=["hopper", "older", "built without sm_90a", "no maps"],
)
def test_hopper_kernels_run_where_they_have_a_body(gpu, on_hopper, emu):
    """Where the library has none for the GPU, or the driver makes no TMA map, those for every GPU run, and are right."""
    emulated.configure(**gpu)
    case = attention(70, 128, B=2)
    check_case(case, torch.bfloat16)
    assert (emulated.shared_memory() > OLDER_GPU) == on_hopper  # of the last kernel of the backward
    ops.causal_attention(*case.inputs(torch.bfloat16))
    assert (emulated.shared_memory() > OLDER_GPU) == on_hopper
    emulated.configure()
    ops.causal_attention(*case.inputs(torch.bfloat16))
    assert emulated.shared_memory() > OLDER_GPU, "what was found of one GPU holds for another"


@pytest.mark.parametrize(("D", "kernel"), [(8, 64), (40, 64), (72, 128), (80, 128), (120, 128)])
def test_head_dims_between_those_of_hopper(D, kernel, emu):
    """TMA loads zeros past the last column: the kernel of the next larger head dim runs, with masks, dropout and groups."""
    emulated.configure()
    asked = []
    for case in (
        attention(70, kernel, B=1),
        attention(70, D, B=2, layout="strided"),
        attention(150, D, H=2, K=1, window=40, dropout_p=0.2),
    ):
        check_case(case, torch.bfloat16)
        ops.causal_attention(*case.inputs(torch.bfloat16), **case.options)
        asked.append(emulated.shared_memory())
    assert asked[1] == asked[0] > 48 << 10


def test_a_refused_call_leaves_no_error_to_the_next(emu):
    """CUDA keeps the last error until it is asked for: the next launch would report it as its own."""
    q = torch.randn(1, 1, 70, 128)
    emulated.configure(smem=50 << 10)  # less than any GPU has
    with pytest.raises(RuntimeError, match="causal_attention: the CUDA launch failed"):
        ops.causal_attention(q, q, q, backend="emu")
    assert ops.gelu(q, backend="emu").isfinite().all()


@pytest.mark.parametrize("dtype", [pytest.param(d, id=n) for n, d in DTYPES.items()])
@pytest.mark.parametrize("case", FEW_QUERIES, ids=lambda c: c.id)
def test_few_queries(case, dtype, emu):
    check_case(case, dtype)
    _, lse = ops.causal_attention(*case.inputs(dtype), **case.options, return_lse=True)
    _, wanted = ops.causal_attention(*case.inputs(dtype), **case.options, return_lse=True, backend="eager")
    torch.testing.assert_close(lse, wanted, rtol=1e-5, atol=1e-5)


def test_few_queries_do_not_meet_nan_in_masked_keys(emu):
    q, k, v = torch.randn(3, 1, 2, 600, 64).unbind()
    k[..., 598, :] = v[..., 598, :] = float("nan")
    out = ops.causal_attention(q[..., -4:, :], k, v)
    assert out[..., :2, :].isfinite().all() and out[..., 2:, :].isnan().all()


@pytest.mark.parametrize(("smem", "dtype"), [gpu for gpu in GPUS if "fp16" not in str(gpu.id)])
@pytest.mark.parametrize("case", MODE_CASES, ids=lambda c: c.id)
def test_no_order_changes_a_bit(case, smem, dtype, emu):
    first = None
    for order, lazy in MODES:
        emulated.configure(order, lazy, seed=7, smem=smem)
        results = run(ops.causal_attention, case, dtype)
        first = first or results
        for a, b in zip(first.outputs + first.grads, results.outputs + results.grads, strict=True):
            assert bitwise(a, b), (order, lazy)


@pytest.mark.parametrize(("smem", "dtype"), GPUS)
def test_nan_in_masked_keys_stays_there(smem, dtype, emu):
    """A bad key or value in a tile that other queries of the block do see, at every head dim that has its own kernel."""
    emulated.configure(smem=smem)
    for D in (32, 64, 128, 256):
        q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 1, 100, D).to(dtype).unbind())
        with torch.no_grad():
            k[..., 70, 3] = float("nan")
            v[..., 80, :] = float("inf")
        out = ops.causal_attention(q, k, v)
        assert out[..., :70, :].isfinite().all() and not out[..., 80:, :].isfinite().any()
        (dq,) = torch.autograd.grad(out[..., :70, :].sum(), q)
        assert dq[..., :70, :].isfinite().all()


def test_misaligned_rows_and_expanded_heads(emu):
    """Strides and addresses that are no multiples of 16 bytes, and heads that share memory (stride 0)."""
    buffer = torch.randn(3, 2, 50, 67).bfloat16()
    q, k, v = buffer[..., 1:65].unsqueeze(0).unbind(1)
    shared = k[:, :1].expand_as(k)
    for x in (k, shared):
        a, b = (f(q, x, v) for f in (ops.causal_attention, lambda *t: ops.causal_attention(*t, backend="cpu")))
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
    aligned = torch.randn(1, 1, 60, 64).bfloat16().expand(1, 3, 60, 64)
    a, b = (ops.causal_attention(aligned, aligned, aligned, backend=name) for name in ("auto", "cpu"))
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_int32_lengths_and_lengths_out_of_range(emu):
    """Lengths stay on the GPU, so kernels clamp those that nobody has looked at, as in a captured call."""
    q, k, v = torch.randn(3, 2, 1, 30, 16)
    wanted = ops.causal_attention(q, k, v, seq_lens=torch.tensor([30, 0]))
    for dtype in (torch.int32, torch.int64):
        lengths = torch.tensor([1 << 30, -5], dtype=dtype)
        got, _ = torch.ops.gptfast_emu.causal_attention_fwd(q, k, v, lengths, None, True, 0.25, 0.0, 0, 0, 0)
        assert bitwise(got, wanted)


def test_pure(emu):
    for case in MODE_CASES:
        check_pure(case, torch.float32)
