"""sample: the kept set and the draw of the contract on every ISA, statistics, errors."""

from __future__ import annotations

import pytest
import torch

from gptfast import ops
from gptfast.ops import reference
from gptfast.testing import dtypes

SETTINGS = [
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 50},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.5},
    {"temperature": 0.0},
    {"top_k": 1},
    {"temperature": 2.0, "top_k": 5000, "top_p": 0.999},
    {"top_p": 1e-6},
]


@pytest.mark.parametrize("dtype", dtypes())
@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 63, 100, 50257])
def test_equals_the_reference(V, dtype, isa):
    """Token for token. Scores of float32 noise differ by about 1e-6, so two tokens swap once in some 10^5 draws."""
    for n, options in enumerate(SETTINGS):
        logits = (torch.randn(4, V) * 3).to(dtype)
        if V > 50:
            logits[:, ::7] = logits[:, :1].clone()  # ties
        logits[1, : V // 2] = float("-inf")
        key = {"seed": 2**63 + n, "position": 9 + n}
        assert torch.equal(ops.sample(logits, **options, **key), reference.sample(logits, **options, **key)), options


def test_ties_go_to_the_lowest_ids(isa):
    logits = torch.zeros(1, 100)
    logits[0, 40:] = 1.0
    assert ops.sample(logits, temperature=0.0).item() == 40
    drawn = {ops.sample(logits, top_k=3, seed=s).item() for s in range(200)}
    assert drawn == {40, 41, 42}
    nucleus = {ops.sample(logits.clamp_min(1.0)[:, :10], top_p=0.35, seed=s).item() for s in range(200)}
    assert nucleus == {0, 1, 2, 3}  # 4 of 10 equal tokens reach 0.35


def test_zeros_of_both_signs_tie(isa):
    for zeros in ([-0.0, 0.0, 0.0], [0.0, -0.0, -0.0]):
        assert ops.sample(torch.tensor([zeros]), temperature=0.0).item() == 0
        assert kept(zeros, top_k=2) == {0, 1}


def kept(logits, draws=300, **options):
    """The tokens that are drawn from these logits, each of which is likely."""
    rows = torch.tensor([logits]).expand(draws, len(logits))
    return set(ops.sample(rows, seed=5, **options).tolist())


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_the_nucleus_is_not_rounded(backend, isa):
    """0.3 of ten equal tokens are three, not four, and 0.9 are nine, not ten: top_p and the masses keep their digits."""
    for top_p, tokens in ((0.3, 3), (0.9, 9), (0.7, 7), (0.1, 1), (0.30000001, 4)):
        assert kept([2.0] * 10, top_p=top_p, backend=backend) == set(range(tokens)), top_p


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.5}, {"top_k": 3}, {"top_k": 3, "top_p": 0.9}, {"temperature": 0.0}]
)
def test_an_infinite_logit_is_certain(options, backend, isa):
    inf = float("inf")
    assert kept([0.0, 3.0, inf, 1.0], backend=backend, **options) == {2}
    assert kept([0.0, inf, inf, -inf], backend=backend, **options) == {1}  # ties to the lowest id


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 2**-126, 1e-37, 1e-30, 1e-10])
def test_a_tiny_temperature_takes_the_largest(temperature, backend, isa):
    for options in ({}, {"top_p": 0.9}, {"top_k": 2}):
        assert kept([0.0, 3.0, 40.0, 39.0], temperature=temperature, backend=backend, **options) == {2}
        assert kept([-50.0, -40.0, -30.0], temperature=temperature, backend=backend, **options) == {2}


@pytest.mark.parametrize("temperature", [1e3, 1e30, 3e38])
def test_a_huge_temperature_forgets_the_logits(temperature, isa):
    assert kept([0.0, 3.0, 40.0, float("-inf")], temperature=temperature) == {0, 1, 2}


def test_strided_rows_and_masked_tokens(isa):
    x = torch.randn(3, 60)[:, 5:45]
    x[:, 7] = float("-inf")
    key = {"seed": 1, "position": torch.tensor([1, 2, 3]), "stream": torch.tensor([0, 0, 2**32 - 1])}
    assert torch.equal(ops.sample(x, **key), ops.sample(x.contiguous(), **key))
    assert all((ops.sample(x, seed=s, temperature=5.0) != 7).all() for s in range(100))


def test_a_row_depends_on_its_coordinates_alone(isa):
    logits = torch.randn(5, 300)
    together = ops.sample(logits, seed=3, position=8, stream=torch.arange(10, 15))
    alone = [ops.sample(logits[r : r + 1], seed=3, position=8, stream=10 + r).item() for r in range(5)]
    assert together.tolist() == alone
    assert torch.equal(ops.sample(logits, seed=3), ops.sample(logits, seed=3, stream=torch.arange(5)))


ROWS = [{**options, "seed": 2**64 - 1 - n} for n, options in enumerate(SETTINGS)]


def options_of(rows):
    return torch.tensor([ops.row_options(**row) for row in rows])


@pytest.mark.parametrize("dtype", dtypes())
def test_rows_with_parameters_of_their_own(dtype, isa):
    logits = (torch.randn(len(ROWS), 1501) * 3).to(dtype)
    at = {"position": torch.arange(5, 5 + len(ROWS)), "stream": torch.arange(len(ROWS)).flip(0)}
    drawn = ops.sample_rows(logits, options_of(ROWS), **at)
    for r, row in enumerate(ROWS):
        key = {name: int(values[r]) for name, values in at.items()}
        assert drawn[r] == ops.sample(logits[r : r + 1], **row, **key), row
    assert torch.equal(reference.sample_rows(logits, options_of(ROWS), **at), drawn)
    strided = options_of(ROWS).t().contiguous().t()
    assert torch.equal(ops.sample_rows(logits, strided, **at), drawn)


def test_options_are_bits():
    assert ops.row_options(0.5, 3, 0.25, 2**64 - 2) == (0x3FE << 52, 3, 0x3FD << 52, -2)
    assert ops.row_options() == (0x3FF << 52, 0, 0x3FF << 52, 0)
    assert ops.sample_rows(torch.zeros(0, 5), torch.zeros(0, 4, dtype=torch.int64)).tolist() == []


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.6, "temperature": 1.5}])
def test_draws_follow_the_distribution(options):
    """Chi-square of 20,000 draws against the exact probabilities; every drawn token is in the kept set."""
    V, draws = 12, 20000
    logits = torch.randn(1, V) * 1.5
    tokens = ops.sample(logits.expand(draws, V), seed=17, stream=torch.arange(draws), **options)
    keep = reference.kept_tokens(
        logits, options.get("temperature", 1.0), options.get("top_k", 0), options.get("top_p", 1)
    )
    probs = (logits.double() / options.get("temperature", 1.0)).masked_fill(~keep, float("-inf")).softmax(-1)[0]
    counts = torch.bincount(tokens, minlength=V).double()
    assert (counts[~keep[0]] == 0).all()
    kept = probs > 0
    chi2 = ((counts[kept] - draws * probs[kept]) ** 2 / (draws * probs[kept])).sum().item()
    freedom = kept.sum().item() - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5 + 10, (chi2, freedom)


def test_opcheck_and_compile():
    logits, row = torch.randn(3, 20), torch.arange(3)
    torch.library.opcheck(torch.ops.gptfast.sample.default, (logits, 1.0, 5, 0.9, 1, row, row))
    options = options_of([{"top_k": 5}, {"temperature": 0.0}, {"top_p": 0.9}])
    torch.library.opcheck(torch.ops.gptfast.sample_rows.default, (logits, options, row, row))
    rows = torch.compile(lambda x: ops.sample_rows(x, options) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(rows(logits), ops.sample_rows(logits, options) + 1)
    f = torch.compile(lambda x: ops.sample(x, top_k=5, seed=2) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(f(logits), ops.sample(logits, top_k=5, seed=2) + 1)


def test_inputs_unchanged_and_no_gradient():
    logits = torch.randn(3, 20, requires_grad=True)
    before = logits.detach().clone()
    assert not ops.sample(logits, top_p=0.5).requires_grad
    assert torch.equal(logits.detach(), before)


def bad(n, value):
    """Options of two rows, the second with one that is out of range, as bits."""
    options = options_of([{}, {}])
    options[1, n] = value
    return options


@pytest.mark.parametrize(("n", "value"), [(0, -1), (0, 0x7FF << 52), (1, -1), (2, 0), (2, 0x400 << 52), (2, -1)])
def test_options_out_of_range(n, value, emu):
    """Unseen by Python, as on a GPU: the kernels say so, and a NaN is out of range too."""
    x, rows = torch.zeros(2, 40), torch.arange(2)
    with pytest.raises(ValueError, match="sample_rows: "):
        ops.sample_rows(x, bad(n, value))
    for operators in (torch.ops.gptfast, torch.ops.gptfast_emu):
        with pytest.raises(RuntimeError, match=r"options\[1\] are out of range|expected temperature >= 0"):
            operators.sample_rows(x, bad(n, value), rows, rows)


X = torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: ops.sample(X[0]), ValueError, r"sample: logits has shape \(4,\); expected \(B, V\)"),
        (lambda: ops.sample(X[:, :0]), ValueError, r"logits has shape \(2, 0\)"),
        (lambda: ops.sample(X.long()), TypeError, "logits has dtype torch.int64"),
        (lambda: ops.sample(X, temperature=-1.0), ValueError, "temperature is -1.0; expected a finite number >= 0"),
        (lambda: ops.sample(X, temperature=float("nan")), ValueError, "temperature is nan"),
        (lambda: ops.sample(X, temperature=float("inf")), ValueError, "temperature is inf"),
        (lambda: ops.sample(X, top_k=-1), ValueError, "top_k is -1; expected an int from 0"),
        (lambda: ops.sample(X, top_k=2.5), TypeError, "top_k is 2.5"),
        (lambda: ops.sample(X, top_p=0.0), ValueError, "top_p is 0.0; expected 0 < top_p <= 1"),
        (lambda: ops.sample(X, top_p=1.5), ValueError, "top_p is 1.5"),
        (lambda: ops.sample(X, seed=-1), ValueError, "seed is -1"),
        (lambda: ops.sample(X, position=2**32), ValueError, "position is 4294967296"),
        (lambda: ops.sample(X, position=torch.tensor([1])), TypeError, r"position is \(1,\) torch.int64"),
        (lambda: ops.sample(X, stream=torch.tensor([0, -1])), ValueError, "stream has values outside"),
        (lambda: ops.sample(X * float("nan")), RuntimeError, r"logits\[0\] holds nan"),
        (lambda: ops.sample(X - float("inf")), RuntimeError, r"logits\[0\] holds nothing but -inf"),
        (lambda: ops.sample(X * float("nan"), backend="eager"), RuntimeError, r"logits\[0\] holds nan"),
        (
            lambda: ops.sample_rows(X, [1, 2]),
            TypeError,
            r"sample_rows: options is list; expected an int64 tensor of shape \(2, 4\)",
        ),
        (lambda: ops.sample_rows(X, X), TypeError, r"options is \(2, 4\) torch.float32"),
        (lambda: ops.sample_rows(X, bad(0, 0)[:1]), TypeError, r"options is \(1, 4\) torch.int64"),
        (lambda: ops.sample_rows(X[0], bad(0, 0)), ValueError, r"sample_rows: logits has shape \(4,\)"),
        (lambda: ops.sample_rows(X, bad(0, 0), stream=-1), ValueError, "sample_rows: stream is -1"),
        (lambda: ops.sample_rows(X * float("nan"), bad(0, 0)), RuntimeError, r"logits\[0\] holds nan"),
        (
            lambda: ops.sample_rows(X * float("nan"), bad(0, 0), backend="eager"),
            RuntimeError,
            r"sample_rows: logits\[0\] holds",
        ),
        (lambda: ops.row_options(temperature=-1.0), ValueError, "sample_rows: temperature is -1.0"),
    ],
)
def test_errors(call, error, match):
    with pytest.raises(error, match=match):
        call()
