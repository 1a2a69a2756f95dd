"""What belongs to an op is all there: the places of CONTRIBUTING's "How to add an op" that a test of the op would not miss."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from gptfast import _schemas, ops
from gptfast.backend import has_kernel
from gptfast.ops import reference
from gptfast.testing import SPECS, bench_cases, cases

# Made from another op, or of no kernel: the tests of that op or of its file cover them.
HELPERS = {
    "dequantize_mxfp4",
    "dropout_mask",
    "embedding",
    "linear_logprobs",
    "load_balance_loss",
    "quantize_groups",
    "quantize_mxfp4",
    "quantize_nf4",
    "real_keys",
    "rotary_tables",
    "route",
    "row_options",
    "sample_rows",
}
TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
PUBLIC = sorted(set(ops.__all__) - HELPERS)


def test_cases_are_of_public_ops():
    assert sorted(SPECS) == PUBLIC, (
        "an op is exported from gptfast/ops/__init__.py and has a file in gptfast/testing/ops"
    )


@pytest.mark.parametrize("op", PUBLIC)
def test_an_op_is_complete(op: str):
    arguments = {name for name in inspect.signature(getattr(ops, op)).parameters if name != "backend"}
    assert set(inspect.signature(getattr(reference, op)).parameters) == arguments, (
        "the reference takes the same arguments"
    )
    assert f'cases("{op}")' in TESTS or op == "sample", "a parity test runs the cases"  # a draw has no tolerance
    assert cases(op)
    assert not bench_cases(op) or (SPECS[op].cost and SPECS[op].peer), (
        "benchmarks need the least work and torch's function"
    )


def test_kernels_without_a_public_op():
    """`_fwd` of a public op, `_bwd` of a `_fwd`: what has a schema has somebody who calls it."""
    names = {_schemas.name_of(s) for schemas in _schemas.KERNELS.values() for s in schemas}
    public = {name.removesuffix("_fwd") for name in names if not name.endswith(("_bwd", "_in_place"))}
    assert public <= set(ops.__all__)
    assert {n.removesuffix("_bwd") + "_fwd" for n in names if n.endswith("_bwd")} <= names
    assert all(has_kernel(op, "triton") for op in public)
