"""cross_entropy, linear_cross_entropy and linear_logprobs: parity on every ISA, and the properties of an op."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from gptfast import ops
from gptfast.testing import Case, cases, check_case, dtypes
from gptfast.testing.accuracy import assert_accurate
from tests.support import emulated
from tests.support.op_properties import check_compiles, check_no_double_backward, check_pure, check_repeatable

CASES = cases("cross_entropy") + cases("linear_cross_entropy")


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.id}")
def test_parity(case, dtype, isa):
    check_case(case, dtype)


@pytest.mark.parametrize("V", range(1, 40))
def test_every_tail_length(V, isa):
    logits, targets = torch.randn(4, V) * 5, torch.randint(V, (4,))
    expected = F.cross_entropy(logits.double(), targets).float()
    torch.testing.assert_close(ops.cross_entropy(logits, targets), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("V", [7, 1031, 9001])
@pytest.mark.parametrize("dtype", dtypes())
def test_a_row_kept_in_shared_memory(dtype, V, smoothing, emu):
    """In place on CUDA: as on a GPU whose blocks have no room for a row, and as float64, in rows that begin anywhere."""
    rows, targets = torch.randn(5, V + 3).to(dtype), torch.tensor([0, V - 1, -100, V // 2, 1])
    x, dloss = rows[:, :V].double(), torch.rand(5)
    exact = torch.autograd.grad(
        F.cross_entropy(x.requires_grad_(), targets, label_smoothing=smoothing, reduction="none"), x, dloss.double()
    )[0]
    found = []
    for room in (0, 1 << 10):
        emulated.configure(smem=room)
        logits = rows.clone()[:, :V]
        loss = torch.ops.gptfast_emu.cross_entropy_in_place(logits, targets, dloss, -100, smoothing)
        found.append((loss, logits))
    for loss, gradient in found:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-6)  # 512 and 1024 threads add in other orders
        error = (gradient.double() - exact).abs().max().item()
        assert error <= torch.finfo(dtype).eps * exact.abs().max().item()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_equals_torch(reduction, smoothing, isa):
    logits = (torch.randn(9, 300) * 4).requires_grad_()
    targets = torch.randint(300, (9,))
    targets[3] = -100
    options = {"reduction": reduction, "label_smoothing": smoothing}
    ours, theirs = ops.cross_entropy(logits, targets, **options), F.cross_entropy(logits, targets, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    upstream = torch.rand(theirs.shape)
    grads = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_masked_and_extreme_logits(isa):
    logits = torch.randn(4, 50)
    logits[:, 10:20] = float("-inf")
    logits[1, 0], logits[2, 0] = 1e4, -1e4
    logits.requires_grad_()
    targets = torch.tensor([0, 0, 0, 30])
    loss = ops.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-5, atol=1e-5)
    (g,) = torch.autograd.grad(loss.sum(), logits)
    assert g.isfinite().all() and (g[:, 10:20] == 0).all()
    assert ops.cross_entropy(logits[:1].detach(), torch.tensor([15])) == float("inf")
    assert ops.cross_entropy(torch.full((1, 3), float("nan")), torch.tensor([1])).isnan()


def test_nothing_counts():
    logits = torch.randn(3, 5, requires_grad=True)
    none = torch.full((3,), -100)
    assert ops.cross_entropy(logits, none).isnan() and F.cross_entropy(logits, none).isnan()
    assert ops.cross_entropy(logits, none, reduction="sum") == 0
    loss = ops.linear_cross_entropy(logits, torch.randn(7, 5), none)
    assert loss.isnan()
    for x in (loss, ops.cross_entropy(logits, none)):
        assert (torch.autograd.grad(x, logits)[0] == 0).all()


def test_no_rows():
    hidden, weight = torch.randn(0, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    nobody = torch.zeros(0, dtype=torch.int64)
    assert ops.cross_entropy(torch.randn(0, 7), nobody).isnan()
    loss = ops.linear_cross_entropy(hidden, weight, nobody, reduction="sum")
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert loss == 0 and grads[0].shape == (0, 5) and (grads[1] == 0).all()


def test_rows_of_any_shape():
    logits, targets = torch.randn(2, 3, 4, 10), torch.randint(10, (2, 3, 4))
    per_row = ops.cross_entropy(logits, targets, reduction="none")
    assert per_row.shape == (2, 3, 4)
    expected = F.cross_entropy(logits.permute(0, 3, 1, 2), targets, reduction="none")
    torch.testing.assert_close(per_row, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_many_chunks_equal_one(reduction, monkeypatch):
    """16 rows a chunk, the last one ragged."""
    leaves = [torch.randn(70, 24).requires_grad_(), (torch.randn(501, 24) / 5).requires_grad_()]
    targets = torch.randint(501, (70,))
    targets[::7] = -100
    results = []
    for chunk in (1, 1 << 26):
        monkeypatch.setattr(sys.modules["gptfast.ops._logit_chunks"], "CHUNK_BYTES", chunk)
        loss = ops.linear_cross_entropy(*leaves, targets, reduction=reduction, label_smoothing=0.1)
        results.append((loss, *torch.autograd.grad(loss, leaves, torch.full(loss.shape, 0.7))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logprobs():
    hidden, weight, targets = torch.randn(2, 5, 8), torch.randn(30, 8, requires_grad=True), torch.randint(30, (2, 5))
    got = ops.linear_logprobs(hidden, weight, targets)
    expected = (hidden @ weight.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, 5)
    grads = [torch.autograd.grad(x, weight, upstream)[0] for x in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    for wrong in (-1, -100, 30):  # nothing is ignored
        with pytest.raises(IndexError, match=f"linear_logprobs: a target is {wrong}; expected 0 to 29 - check"):
            ops.linear_logprobs(hidden, weight, targets.clone().fill_(wrong))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_factor_gets_no_gradient(reduction):
    hidden, weight, targets = torch.randn(7, 8), torch.randn(30, 8), torch.randint(30, (7,))

    def grads(*wanted):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((hidden, weight), wanted, strict=True)]
        ops.linear_cross_entropy(*leaves, targets, reduction=reduction).sum().backward()
        return [t.grad for t in leaves]

    both = grads(True, True)
    assert torch.equal(grads(True, False)[0], both[0]) and grads(True, False)[1] is None
    assert torch.equal(grads(False, True)[1], both[1]) and grads(False, True)[0] is None


def test_fp16_gradients_do_not_underflow(isa):
    """(p - 1) / N is below the least fp16 number here; the loss scale that a trainer applies must still help."""
    N, V, scale = 4096, 2000, 2.0**16
    leaves = [torch.randn(N, 8).half().requires_grad_(), (torch.randn(V, 8) / 3).half().requires_grad_()]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    targets = torch.randint(V, (N,))
    got = torch.autograd.grad(ops.linear_cross_entropy(*leaves, targets) * scale, leaves)
    expected = torch.autograd.grad(ops.linear_cross_entropy(*exact, targets) * scale, exact)
    for g, e in zip(got, expected, strict=True):
        assert ((g.double() - e).norm() / e.norm()).item() < 2e-3


@pytest.mark.parametrize("on_gpu", [False, True])
def test_upstream_factor_is_not_rounded(on_gpu, monkeypatch):
    """A third, rounded to bf16, would shift every gradient by 0.1 percent. A GPU's factor stays a tensor."""
    if on_gpu:
        monkeypatch.setattr(sys.modules["gptfast.ops.linear_cross_entropy"], "_factor", lambda dtotal: dtotal.view(1))
    leaves = [torch.randn(3, 64).bfloat16().requires_grad_(), torch.randn(500, 64).bfloat16().requires_grad_()]
    targets = torch.randint(500, (3,))
    mean, total = (
        torch.autograd.grad(ops.linear_cross_entropy(*leaves, targets, reduction=r), leaves) for r in ("mean", "sum")
    )
    for m, t in zip(mean, total, strict=True):
        slope = (m.double() * t.double()).sum() / t.double().square().sum()
        assert abs(slope.item() * 3 - 1) < 3e-4


def test_ignored_rows_may_hold_anything(isa):
    logits, targets = torch.randn(3, 40), torch.tensor([2, -100, 5])
    logits[1] = float("nan")
    logits.requires_grad_()
    loss = ops.cross_entropy(logits, targets)
    (g,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, F.cross_entropy(logits[::2], targets[::2]))
    assert (g[1] == 0).all() and g.isfinite().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["spread", "offset 100", "offset -1000", "confident", "late maximum"])
def test_as_exact_as_torch(kind, smoothing, isa):
    """Against F.cross_entropy, not our reference: logits of a real GPT-2 lie around -100, and its rows are confident."""
    targets = torch.randint(5000, (32,))
    logits = torch.randn(32, 5000) * (3 if kind == "spread" else 1)
    if kind.startswith("offset"):
        logits += float(kind.split()[1])
    if kind == "confident":
        logits[torch.arange(32), targets] += 25
        logits -= 50
    if kind == "late maximum":
        logits[:, :4500] -= 200
    options = {"reduction": "none", "label_smoothing": smoothing}
    x, exact = logits.requires_grad_(), logits.detach().double().requires_grad_()
    ours, theirs = ops.cross_entropy(x, targets, **options), F.cross_entropy(x, targets, **options)
    expected = F.cross_entropy(exact, targets, **options)
    (want,) = torch.autograd.grad(expected.sum(), exact)
    grads = [torch.autograd.grad(loss.sum(), x)[0] for loss in (ours, theirs)]
    assert_accurate([ours], [theirs], [expected], 2, "loss")
    assert_accurate([grads[0]], [grads[1]], [want], 3, "gradient")


def test_under_autocast():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets = torch.randint(30, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, targets)
        expected = F.cross_entropy(F.linear(hidden, weight), targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected.float(), rtol=2e-2, atol=2e-2)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [g.dtype for g in grads] == [torch.float32] * 2
    assert (grads[1] != grads[1].bfloat16().float()).any()  # summed in fp32, and kept
    exact = [t.detach().bfloat16().double().requires_grad_() for t in (hidden, weight)]
    wanted = torch.autograd.grad(ops.linear_cross_entropy(*exact, targets), exact)
    for g, w in zip(grads, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=2e-2, atol=2e-2 * w.abs().max().item())


def test_repeatable(threads):
    for case in cases("cross_entropy"):
        check_repeatable(case, torch.float32)
    for case in (*cases("linear_cross_entropy"), Case("linear_cross_entropy", {"N": 40, "C": 24, "V": 2049})):
        check_repeatable(case, torch.float32)
        check_repeatable(case, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(dtype):
    """Less than 100 MB beside inputs and outputs, forward and backward, where the logits alone are 412 MB in fp32."""
    code = f"""
import re, torch, gptfast
from gptfast import ops
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
hidden, weight = (torch.randn(n, 768).mul_(0.05).to({dtype}).requires_grad_() for n in (2048, 50257))
targets = torch.randint(50257, (2048,))
ops.linear_cross_entropy(hidden[:32], weight[:64], targets[:32] % 64).backward()  # measures its products
hidden.grad = weight.grad = None
before = peak()
ops.linear_cross_entropy(hidden, weight, targets).backward()
outputs = hidden.numel() * hidden.element_size() + weight.numel() * 4  # the gradient of weight is summed in fp32
if weight.dtype != torch.float32:
    outputs += weight.numel() * weight.element_size()
print((peak() - before - outputs) / 1e6)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 100


def test_pure():
    for case in CASES:
        check_pure(case, torch.float32)


def test_reference_gradcheck():
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, -100, 2])
    torch.autograd.gradcheck(lambda x: ops.cross_entropy(x, targets, label_smoothing=0.1), (logits,))
    torch.autograd.gradcheck(lambda x, w: ops.linear_cross_entropy(x, w, targets), (logits, weight))


def test_compiles():
    logits, weight, targets = torch.randn(6, 16), torch.randn(9, 16), torch.randint(9, (6,))
    check_compiles(lambda x: ops.cross_entropy(x, targets, label_smoothing=0.1), logits)
    check_compiles(lambda x, w: ops.linear_cross_entropy(x, w, targets), logits, weight)
    check_compiles(lambda x, w: ops.linear_cross_entropy(x, w, targets, reduction="none").sum(), logits, weight)
    square = torch.randn(6, 6)
    check_compiles(lambda x: ops.linear_cross_entropy(x, x, torch.arange(6)), square)


def test_no_double_backward():
    targets = torch.tensor([1, 2])
    weight = torch.randn(9, 5)
    check_no_double_backward(lambda x: ops.cross_entropy(x, targets) ** 2, torch.randn(2, 5), "cross_entropy: double")
    for reduction in ("mean", "none"):
        check_no_double_backward(
            lambda x, r=reduction: ops.linear_cross_entropy(x, weight, targets, reduction=r) ** 2,
            torch.randn(2, 5),
            "linear_cross_entropy: double backward",
        )


X, T = torch.zeros(2, 4), torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.cross_entropy(X.int(), T), TypeError, "cross_entropy: logits has dtype torch.int32"),
        (lambda: ops.cross_entropy(X, T.float()), TypeError, "cross_entropy: targets has dtype torch.float32"),
        (lambda: ops.cross_entropy(X, T[:1]), ValueError, r"targets has shape \(1,\); expected \(2,\)"),
        (lambda: ops.cross_entropy(X, T + 1), IndexError, r"a target is 4; expected 0 to 3, or ignore_index \(-100\)"),
        (lambda: ops.cross_entropy(X, -T), IndexError, "a target is -3"),
        (lambda: ops.cross_entropy(X, T, reduction="avg"), ValueError, "reduction is 'avg'"),
        (lambda: ops.cross_entropy(X, T, label_smoothing=1.5), ValueError, "label_smoothing is 1.5"),
        (lambda: ops.cross_entropy(X[:, :0], T), ValueError, r"logits has shape \(2, 0\)"),
        (
            lambda: ops.linear_cross_entropy(X, torch.zeros(9, 5), T),
            ValueError,
            r"hidden has shape \(2, 4\) and weight",
        ),
        (lambda: ops.linear_cross_entropy(X, torch.zeros(3, 4), T), IndexError, "a target is 3; expected 0 to 2"),
        (lambda: ops.linear_cross_entropy(X, X.half(), T), TypeError, "hidden is torch.float32 but weight is"),
        (lambda: ops.linear_cross_entropy(X, X[:0], T), ValueError, r"weight \(0, 4\); expected .* with V >= 1"),
        (lambda: ops.linear_logprobs(X, X, [0, 1]), TypeError, "linear_logprobs: targets has dtype list"),
        (
            lambda: torch.ops.gptfast.cross_entropy_fwd(X, T + 1, -100, 0.0),
            RuntimeError,
            r"cross_entropy: targets\[1\] is 4",
        ),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
