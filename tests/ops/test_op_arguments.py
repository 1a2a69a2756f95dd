"""What users hand to ops by mistake: an error that names the op and the argument, the same on every backend."""

from __future__ import annotations

import re

import pytest
import torch

import gptfast
from gptfast import ops
from gptfast.backend import has_cpu_ops

Q = torch.randn(1, 2, 4, 8)
X, W = torch.randn(3, 8), torch.ones(8)
TABLE, IDS = torch.randn(20, 8), torch.tensor([1, 2, 3])

CODES = torch.zeros(4, dtype=torch.uint8)
CASES = {
    "sparse": (lambda: ops.gelu(X.to_sparse()), TypeError, "gelu: x has layout torch.sparse_coo; expected a dense"),
    "bias dtype": (
        lambda: ops.linear(X, torch.ones(2, 8), torch.ones(2).half()),
        TypeError,
        "linear: weight is torch.float32 but bias is torch.float16",
    ),
    "nf4 shape": (
        lambda: ops.dequantize_nf4(CODES, torch.ones(1), shape=8, block_size=64),
        TypeError,
        "dequantize_nf4: shape is 8; expected a tuple of sizes",
    ),
    "nf4 None": (
        lambda: ops.dequantize_nf4(CODES, None, shape=(8,), block_size=64),
        TypeError,
        "dequantize_nf4: absmax is a NoneType",
    ),
    "codes None": (
        lambda: ops.quantized_linear(X, None, torch.ones(4, 1).half(), format="int8"),
        TypeError,
        "quantized_linear: codes is a NoneType",
    ),
    "residual elsewhere": (
        lambda: ops.add_layer_norm(X, X.to("meta"), W),
        ValueError,
        "add_layer_norm: all tensors must be on one device, got x on cpu, residual on meta",
    ),
    "eps beyond floats": (
        lambda: ops.layer_norm(X, W, eps=10**400),
        ValueError,
        "layer_norm: eps is an int of 1329 bits",
    ),
    "attention None": (lambda: ops.causal_attention(Q, None, Q), TypeError, "causal_attention: k is a NoneType"),
    "attention no q": (lambda: ops.causal_attention(None, Q, Q), TypeError, "causal_attention: q is a NoneType"),
    "window bool": (lambda: ops.causal_attention(Q, Q, Q, window=True), TypeError, "causal_attention: window is True"),
    "window float": (lambda: ops.causal_attention(Q, Q, Q, window=2.5), TypeError, "causal_attention: window is 2.5"),
    "window large": (
        lambda: ops.causal_attention(Q, Q, Q, window=2**63),
        ValueError,
        "causal_attention: window is 9223",
    ),
    "window 0": (lambda: ops.causal_attention(Q, Q, Q, window=0), ValueError, "causal_attention: window is 0"),
    "p bool": (lambda: ops.causal_attention(Q, Q, Q, dropout_p=True), TypeError, "causal_attention: dropout_p is True"),
    "p None": (lambda: ops.causal_attention(Q, Q, Q, dropout_p=None), TypeError, "causal_attention: dropout_p is None"),
    "scale": (
        lambda: ops.causal_attention(Q, Q, Q, softmax_scale="1"),
        TypeError,
        "causal_attention: softmax_scale is '1'",
    ),
    "lens list": (
        lambda: ops.causal_attention(Q, Q, Q, seq_lens=[4]),
        TypeError,
        "causal_attention: seq_lens is a list",
    ),
    "loss None": (
        lambda: ops.linear_cross_entropy(X, None, IDS),
        TypeError,
        "linear_cross_entropy: weight is a NoneType",
    ),
    "loss no x": (
        lambda: ops.linear_cross_entropy(None, TABLE, IDS),
        TypeError,
        "linear_cross_entropy: hidden is a None",
    ),
    "logprobs None": (
        lambda: ops.linear_logprobs(None, TABLE, IDS),
        TypeError,
        "linear_logprobs: hidden is a NoneType",
    ),
    "ignore": (lambda: ops.cross_entropy(X, IDS, ignore_index=2.5), TypeError, "cross_entropy: ignore_index is 2.5"),
    "ignore large": (
        lambda: ops.cross_entropy(X, IDS, ignore_index=2**63),
        ValueError,
        "cross_entropy: ignore_index is 9",
    ),
    "smoothing": (
        lambda: ops.cross_entropy(X, IDS, label_smoothing=None),
        TypeError,
        "cross_entropy: label_smoothing is N",
    ),
    "logits None": (lambda: ops.cross_entropy(None, IDS), TypeError, "cross_entropy: logits is a NoneType"),
    "residual": (lambda: ops.add_layer_norm(X, None, W), TypeError, "add_layer_norm: residual is a NoneType"),
    "norm None": (lambda: ops.layer_norm(X, None), TypeError, "layer_norm: weight is a NoneType"),
    "eps": (lambda: ops.layer_norm(X, W, eps="small"), TypeError, "layer_norm: eps is 'small'"),
    "gelu": (lambda: ops.gelu(None), TypeError, "gelu: x is a NoneType"),
    "dropout": (lambda: ops.dropout(X, True), TypeError, "dropout: p is True"),
    "dropout None": (lambda: ops.dropout(None, 0.5), TypeError, "dropout: x is a NoneType"),
    "mask": (lambda: ops.dropout_mask((1, 2, 3), "half"), TypeError, "dropout_mask: p is 'half'"),
    "linear None": (lambda: ops.linear(X, None), TypeError, "linear: weight is a NoneType"),
    "ids 0": (lambda: ops.embedding(torch.tensor(3), TABLE), ValueError, "embedding: ids has shape ()"),
    "ids None": (lambda: ops.embedding(None, TABLE), TypeError, "embedding: ids has dtype NoneType"),
    "ids list": (lambda: ops.embedding([1, 2], TABLE), TypeError, "embedding: ids is a list"),
    "positions": (
        lambda: ops.embedding(IDS, TABLE, TABLE, IDS / 2),
        TypeError,
        "embedding: positions has dtype torch.float",
    ),
    "table None": (lambda: ops.embedding(IDS, None), TypeError, "embedding: wte is a NoneType"),
    "top_k float": (lambda: ops.sample(X, top_k=2.5), TypeError, "sample: top_k is 2.5"),
    "top_k bool": (lambda: ops.sample(X, top_k=True), TypeError, "sample: top_k is True"),
    "top_k large": (lambda: ops.sample(X, top_k=2**63), ValueError, "sample: top_k is 9223372036854775808"),
    "temperature": (lambda: ops.sample(X, temperature=None), TypeError, "sample: temperature is None"),
    "top_p": (lambda: ops.sample(X, top_p="0.5"), TypeError, "sample: top_p is '0.5'"),
    "sample None": (lambda: ops.sample(None), TypeError, "sample: logits is a NoneType"),
}


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_errors_name_the_op_and_the_argument(name: str, backend: str) -> None:
    call, error, message = CASES[name]
    with gptfast.backend(backend), pytest.raises(error, match=re.escape(message)):
        call()


def test_float64_with_other_dtypes_runs_in_eager() -> None:
    """A weight, bias or table of float64 has no kernel: `auto` takes eager PyTorch, and a backend by name says so."""
    x, wide = torch.randn(3, 8), torch.linspace(0.5, 1.5, 8, dtype=torch.float64)
    calls = {
        "layer_norm": lambda backend=None: ops.layer_norm(x, wide, backend=backend),
        "layer_norm bias": lambda backend=None: ops.layer_norm(x, W, wide, backend=backend),
        "add_layer_norm": lambda backend=None: ops.add_layer_norm(x, x, wide, backend=backend)[0],
        "gelu": lambda backend=None: ops.gelu(x, wide, backend=backend),
    }
    for name, call in calls.items():
        with gptfast.backend("eager"):
            expected = call()
        assert call().dtype == torch.float32 and torch.equal(call(), expected)
        if has_cpu_ops:
            with pytest.raises(TypeError, match=rf"{name.split()[0]}: backend='cpu' computes .* got torch.float64"):
                call("cpu")


@pytest.mark.parametrize(("wte", "wpe"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)], ids=str)
def test_embedding_has_the_dtype_of_its_first_table(wte: torch.dtype, wpe: torch.dtype) -> None:
    tables = TABLE.to(wte), TABLE.flip(0).to(wpe)
    native = ops.embedding(IDS, *tables)
    with gptfast.backend("eager"):
        eager = ops.embedding(IDS, *tables)
    assert native.dtype == eager.dtype == wte and torch.equal(native, eager)
    assert ops.embedding(IDS, TABLE, TABLE.double()).dtype == torch.float32
