"""linear and the matrix product behind it: parity on every ISA, layouts, independence of rows and threads, errors."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.backend import cpu_isa, force_cpu_isa
from gptfast.ops import gemm as gemm_file
from gptfast.testing import Case, cases, check_case, dtypes
from gptfast.testing.accuracy import rounding
from tests.support import X86_PAIRS
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("linear")
SHAPES = [
    (1, 1, 1),
    (5, 33, 7),
    (97, 65, 300),
    (200, 100, 513),
    (96, 32, 256),
    (130, 770, 1030),
    (7, 257, 257),
    (2, 33, 4096),
    (2, 33, 4097),
    (3, 40, 8193),  # words of two bf16: beyond a stretch of 4096 of these too
    (3, 40, 9000),
    (4, 5, 0),
]
FLOATS = (torch.float32, torch.bfloat16)
OPTIONS = list(product(FLOATS, FLOATS, FLOATS, (None, *FLOATS), (False, True)))


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("method", gemm_file.IMPLEMENTATIONS)
def test_parity_of_every_method(method, monkeypatch):
    monkeypatch.setattr(gemm_file, "_FORCED", method)
    for case in CASES:
        check_case(case, torch.float32)


def stored(rows: int, cols: int, by_columns: bool, dtype: torch.dtype) -> torch.Tensor:
    """Random matrix with a gap of three values after every row (or column)."""
    x = torch.randn(cols if by_columns else rows, (rows if by_columns else cols) + 3).to(dtype)[:, :-3]
    return x.t() if by_columns else x


@pytest.mark.parametrize("method", gemm_file.IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["gaps", "one for all", "transposed"])
def test_layouts_of_every_argument(method, dtype, layout, monkeypatch):
    """oneDNN's linear does not look at the stride of a bias."""
    monkeypatch.setattr(gemm_file, "_FORCED", method)

    def laid_out(*shape):
        if layout == "one for all":
            return (
                torch.randn(shape[-1]).to(dtype).expand(shape)
                if len(shape) > 1
                else torch.randn(1).to(dtype).expand(shape)
            )
        x = torch.randn(*shape, 2).to(dtype)[..., 0]
        return x if layout == "gaps" or x.dim() == 1 else x.t().contiguous().t()

    x, weight, bias = laid_out(40, 33), laid_out(17, 33), laid_out(17)
    exact = F.linear(x.double(), weight.double(), bias.double())
    error = (ops.linear(x, weight, bias).double() - exact).abs()
    assert (error <= 4 * torch.finfo(dtype).eps * (x.double().abs() @ weight.double().abs().t() + bias.abs())).all()


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}N{}K{}".format(*s))
def test_product(shape, layout, pairs, isa):
    """Against fp64, with dtypes of the factors, the result and the bias and with accumulation drawn independently.

    A sum may be off by what its terms lose in fp32, in each of K steps by chance: measured up to 1.3 units of the product
    of the norms of its factors. Bias and the result before count in full.
    """
    M, N, K = shape
    for of_a, of_b, of_c, of_bias, add in random.Random(f"{shape} {layout} {pairs}").sample(OPTIONS, 8):
        a, b = stored(M, K, layout[0] == "t", of_a), stored(K, N, layout[1] == "t", of_b)
        c = (torch.randn(M, N + 3) * 10).to(of_c)[:, :-3]
        bias = None if of_bias is None else (torch.randn(N) * 10).to(of_bias)
        sums = torch.full((M,), float("nan")) if layout[0] == "t" else None
        rounded = pairs and cpu_isa() in X86_PAIRS  # elsewhere bfloat16 is multiplied as float32
        exact_a, exact_b = ((x.bfloat16() if rounded else x).double() for x in (a, b))
        more = (0 if bias is None else bias.double()) + (c.double() if add else torch.zeros(M, N))
        expected = exact_a @ exact_b + more
        torch.ops.gptfast.gemm(a, b, bias, c, pairs, add, sums)
        terms = exact_a.norm(dim=1)[:, None] * exact_b.norm(dim=0) + more.abs() + expected.abs()
        limit = rounding(expected, of_c) + 4 * torch.finfo(torch.float32).eps * terms
        error = (c.double() - expected).abs()
        assert (error <= limit).all(), (of_a, of_b, of_c, of_bias, add, (error / limit).max().item())
        if sums is not None:
            torch.testing.assert_close(sums, a.float().sum(1), rtol=1e-5, atol=1e-5 * (K**0.5 + 1))


@pytest.mark.parametrize("shape", [(17, 33, 41), (8, 16, 24), (7, 5, 3)])
def test_products_in_whole_eights(shape):
    """What a GPU's products of ragged sides are cut into."""
    M, K, N = shape
    for of_a, of_b, add in product("nt", "nt", (False, True)):
        a, b = (
            torch.randn(*s) if of == "n" else torch.randn(*s[::-1]).t() for s, of in (((M, K), of_a), ((K, N), of_b))
        )
        c = torch.randn(M, N)
        expected = a.double() @ b.double() + (c if add else 0)
        gemm_file._in_eights(a, b, c if add else c.fill_(torch.nan), add)
        torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("N", [1024, 1025, 1100])
def test_more_columns_than_the_workspace_holds(N, isa):
    """Packed weights beyond 16 MB come in stretches of columns, here of 1024: the last ones as in a call of their own."""
    a, b, bias = torch.randn(2, 4096), torch.randn(N, 4096), torch.randn(N)
    c, last = torch.full((2, N), float("nan")), torch.full((2, 90), float("nan"))
    torch.ops.gptfast.gemm(a, b.t(), bias, c, False, False, None)
    torch.testing.assert_close(c.double(), a.double() @ b.double().t() + bias, rtol=1e-4, atol=1e-3)
    torch.ops.gptfast.gemm(a, b[-90:].t(), bias[-90:], last, False, False, None)
    assert torch.equal(c[:, -90:], last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (200, 31), (1000, 96)], ids=str)
def test_column_sums(shape, dtype, isa):
    M, N = shape
    x = torch.full((M, N + 5), torch.nan, dtype=dtype)[:, :N].copy_(torch.randn(shape))
    sums = torch.full((N,), torch.nan)
    gemm_file.column_sums(x, sums)
    # 1000 values: off by up to 1e-5 in fp32, 1e-2 if they were summed in bfloat16
    torch.testing.assert_close(sums.double(), x.double().sum(0), rtol=0, atol=1e-6 * M**0.5 * 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [600, 4096, 4097, 8193])
def test_a_row_depends_on_no_other_row(K, dtype, isa):
    x, weight, bias = torch.randn(200, K).to(dtype), torch.randn(50, K).to(dtype), torch.randn(50).to(dtype)
    y = ops.linear(x, weight, bias)
    for n in (16, 17, 95, 96, 97, 192, 193):
        assert torch.equal(ops.linear(x[:n], weight, bias), y[:n])


def test_repeatable(threads):
    for case in [*CASES, Case("linear", {"N": 300, "C": 500, "M": 900})]:
        check_repeatable(case, torch.float32)
        check_repeatable(case, torch.bfloat16)


def test_pure():
    for case in CASES:
        check_pure(case, torch.float32)


def test_fp64_passes_gradcheck():
    args = [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in ((17, 5), (3, 5), (3,))]
    for activation in (None, "gelu_tanh", "relu", "relu_squared", "silu", "quick_gelu", "tanh"):
        torch.autograd.gradcheck(lambda x, w, b, a=activation: ops.linear(x, w, b, a), args)


def test_compiles():
    x, weight, bias = torch.randn(20, 16), torch.randn(7, 16), torch.randn(7)
    check_compiles(lambda x, w, b: ops.linear(x, w, b, "gelu_tanh"), x, weight, bias)
    check_compiles(lambda x, w: ops.linear(x, w), x, weight)
    check_compiles(lambda x: ops.linear(x, x), torch.randn(16, 16))


def test_opcheck():
    x, weight, bias, dy = torch.randn(20, 16), torch.randn(7, 16), torch.randn(7), torch.randn(20, 7)
    torch.library.opcheck(torch.ops.gptfast.linear_fwd.default, (x, weight, bias))
    for wanted in ((True, True, True), (False, True, False), (True, False, True)):
        torch.library.opcheck(torch.ops.gptfast.linear_bwd.default, (dy, x, weight, *wanted))


def test_no_double_backward():
    weight = torch.randn(7, 16)
    check_no_double_backward(lambda x: ops.linear(x, weight) ** 2, torch.randn(20, 16), "linear: double backward")


def test_autocast_keeps_the_fp32_gradient_of_a_weight():
    x, weight, bias = torch.randn(40, 64), torch.randn(32, 64, requires_grad=True), torch.randn(32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.linear(x, weight, bias)
        wanted = F.linear(x, weight, bias)
    assert y.dtype == wanted.dtype == torch.bfloat16
    # Where the CPU has no products of pairs of bf16, ours take the fp32 weight as it is: nearer to the exact product.
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert (y.double() - exact).abs().max() <= 1.2 * (wanted.double() - exact).abs().max()
    dy = torch.randn(40, 32).bfloat16()
    dweight, dbias = torch.autograd.grad(y, (weight, bias), dy)
    assert dweight.dtype == dbias.dtype == torch.float32
    torch.testing.assert_close(dweight.double(), dy.double().t() @ x.bfloat16().double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dbias, dy.float().sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4, 3), (0, 3)])
def test_any_leading_dimensions(shape):
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    y, expected = ops.linear(x, weight), F.linear(x, weight)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, weight), dy), torch.autograd.grad(expected, (x, weight), dy), rtol=1e-5, atol=1e-5
    )


def test_an_expanded_gradient():
    x, weight = torch.randn(20, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    got = torch.autograd.grad(ops.linear(x, weight).sum(), (x, weight))
    torch.testing.assert_close(got, torch.autograd.grad(F.linear(x, weight).sum(), (x, weight)))


@pytest.fixture
def unforced(monkeypatch):
    """As without GPTFAST_GEMM."""
    monkeypatch.setattr(gemm_file, "_FORCED", "")


@pytest.fixture
def amx(request, monkeypatch):
    """As on a CPU with or without AMX."""
    monkeypatch.setattr(gemm_file, "has_amx", lambda: request.param)


@pytest.mark.parametrize("amx", [False, True], indirect=True)
def test_the_rule_looks_at_instructions_and_dtype_and_at_no_clock(unforced, amx, isa, request, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("timed"))
    tiles = request.node.callspec.params["amx"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = "torch" if isa == "scalar" or (tiles and dtype == torch.bfloat16) else "own"
        a = torch.randn(64, 64).to(dtype)
        assert {gemm_file.implementation_for(x, y, dtype) for x in (a, a.t()) for y in (a, a.t())} == {expected}
        groups = "own" if isa == "amx" else expected
        assert gemm_file.implementation_for(a, a, dtype, of_groups=True) == groups
        assert gemm_file.implementations_of(str(dtype)[6:]) == {
            **{f"{layout} {str(dtype)[6:]}": expected for layout in ("nn", "nt", "tn", "tt")},
            f"groups {str(dtype)[6:]}": groups,
        }
        assert gemm_file.implementation_for(a[:4], a.t(), dtype) == "torch"  # few rows
    assert gemm_file.implementation_for(a.double(), a.t().double(), torch.float64) == "torch"


@pytest.mark.parametrize("amx", [False], indirect=True)
def test_the_ways_of_another_process_are_kept_inside_the_with(unforced, amx):
    a = torch.randn(64, 64)
    before = gemm_file.implementations_of("float32")
    with gemm_file.use_implementations({"nn float32": "onednn", "nt bfloat16": "torch"}):
        assert gemm_file.implementation_for(a, a, torch.float32) == "onednn"
        assert gemm_file.implementations_of("float32") == {**before, "nn float32": "onednn"}
        with gemm_file.use_implementations({}):
            assert gemm_file.implementations_of("float32") == before
        assert gemm_file.implementations_of("float32")["nn float32"] == "onednn"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(gemm_file.implementations_of, "float32").result() == before, "in another thread"
    assert gemm_file.implementations_of("float32") == before
    expected = "gemm: implementation of nn float32 is 'blas'; expected one of own, torch, onednn"
    with pytest.raises(ValueError, match=expected), gemm_file.use_implementations({"nn float32": "blas"}):
        pass


def test_the_environment_forces_an_implementation():
    def chosen(name: str, M: int = 64, K: int = 64, N: int = 64) -> subprocess.CompletedProcess:
        code = "import torch; from gptfast.ops import gemm as g; "
        code += f"print(g.implementation_for(torch.ones({M}, {K}), torch.ones({K}, {N}), torch.float32))"
        environment = {**os.environ, "GPTFAST_GEMM": name}
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)

    assert chosen("onednn").stdout.strip() == "onednn"
    assert {chosen("onednn", **{name: 8}).stdout.strip() for name in "MKN"} == {"torch"}
    assert chosen("own", K=1).stdout.strip() == "own"
    assert "GPTFAST_GEMM is 'blas'; expected one of own, torch, onednn" in chosen("blas").stderr


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("amx", [False], indirect=True)
def test_onednn_is_asked_for_what_it_multiplies_here(unforced, amx, monkeypatch, has):
    """Its products of bfloat16 need AVX-512: without, it raises."""
    monkeypatch.setattr(gemm_file, "_onednn_multiplies", lambda dtype: dtype == torch.float32 or has)
    a = torch.ones(64, 64)
    with gemm_file.use_implementations({"nn float32": "onednn", "nn bfloat16": "onednn"}):
        assert gemm_file.implementation_for(a, a, torch.float32) == "onednn"
        assert gemm_file.implementation_for(a, a, torch.bfloat16) == ("onednn" if has else "torch")


X, W = torch.zeros(20, 4), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.linear(X, W[:, :3]), ValueError, r"linear: x has shape \(20, 4\) and weight \(3, 3\); expected x"),
        (lambda: ops.linear(X, W, torch.zeros(4)), ValueError, r"linear: bias has shape \(4,\); expected \(3,\)"),
        (lambda: ops.linear(X, W, activation="mish"), ValueError, "linear: activation is 'mish'; expected one of None"),
        (lambda: ops.linear(X.int(), W), TypeError, "linear: x has dtype torch.int32"),
        (lambda: ops.linear(X, W.half()), TypeError, "linear: x is torch.float32 but weight is torch.float16; cast"),
        (
            lambda: torch.ops.gptfast.gemm(X, X, None, X.clone(), False, False, None),
            RuntimeError,
            r"gemm: expected a \(M, K\), b \(K, N\), c \(M, N\)",
        ),
        (
            lambda: torch.ops.gptfast.gemm(
                torch.zeros(4, 4, 4)[:, :, 0], X.t(), None, torch.zeros(4, 20), False, False, None
            ),
            RuntimeError,
            "gemm: a must be contiguous along its rows or its columns",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_isas_agree():
    """The same order of sums on every ISA: only fused multiply-adds differ."""
    case = Case("linear", {"N": 40, "C": 700, "M": 33})
    results = []
    for name in ("scalar", cpu_isa()):
        with force_cpu_isa(name):
            results.append(ops.linear(*case.inputs(torch.float32)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 40])
def test_the_gradient_of_a_transposed_weight_lies_as_the_weight(rows: int, dtype: torch.dtype):
    """No copy for `Conv1D`'s (in, out) matrices: W.grad is made in W's own layout, and by the same products."""
    torch.manual_seed(0)
    x, matrix, bias = torch.randn(rows, 24), torch.randn(24, 33), torch.randn(33)
    operands = [t.to(dtype).requires_grad_() for t in (x, matrix, bias)]
    y = ops.linear(operands[0], operands[1].t(), operands[2])
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, operands, dy)
    assert gradients[1].shape == (24, 33) and gradients[1].is_contiguous()
    exact = [t.detach().double() for t in operands]
    wanted = [dy.double() @ exact[1].t(), exact[0].t() @ dy.double(), dy.double().sum(0)]
    allowed = 8 * torch.finfo(dtype).eps  # of the largest: sums of 40 products in fp32, measured 1.6
    for got, want in zip([y.detach(), *gradients], [exact[0] @ exact[1] + exact[2], *wanted], strict=True):
        assert (got - want).abs().max() <= allowed * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_columns_do_not_depend_on_how_many_there_are(dtype, isa, threads):
    """Where few rows meet many columns each item packs its own: the bits of narrow products, which all threads pack."""
    x, weight, bias = (torch.randn(*s).to(dtype) for s in ((100, 70), (3300, 70), (3300,)))
    y = ops.linear(x, weight, bias)
    for a, b in ((0, 600), (3000, 3300)):
        assert torch.equal(ops.linear(x, weight[a:b], bias[a:b]), y[:, a:b])
