"""Memory of results: that of large ones is kept for the next one of about the same size, up to a limit, and never shared.
Callers may write into a result."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

import gptfast
from gptfast import ops
from gptfast.backend import has_cpu_ops
from gptfast.testing import SPECS, cases

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled ops")
MB = 1 << 20


@pytest.fixture(autouse=True)
def _limit() -> Iterator[None]:
    """Starts with nothing kept, and restores the default limit."""
    torch.ops.gptfast.keep_results(0)
    torch.ops.gptfast.keep_results(256 * MB)
    yield
    torch.ops.gptfast.keep_results(0)
    torch.ops.gptfast.keep_results(256 * MB)


def result(megabytes: int) -> torch.Tensor:
    return ops.gelu(torch.ones(megabytes * MB // 4))


def test_memory_of_a_freed_result_serves_the_next():
    y = result(8)
    place = y.data_ptr()
    del y
    assert result(8).data_ptr() == place
    assert result(7).data_ptr() == place  # a little smaller


def test_live_results_never_share_memory():
    alive = [result(4) for _ in range(6)]
    assert len({y.data_ptr() for y in alive}) == 6
    view = alive[2][100:200]
    place = alive[2].data_ptr()
    del alive[2]
    assert result(4).data_ptr() != place  # the view still needs it
    assert (view == view[0]).all()


def test_memory_of_another_size_is_left():
    place = result(16).data_ptr()
    assert result(4).data_ptr() != place


def test_over_the_limit_the_oldest_goes_first():
    torch.ops.gptfast.keep_results(8 * MB)
    older, newer = result(4), result(6)
    place = newer.data_ptr()
    del older
    del newer
    assert result(6).data_ptr() == place


def test_tune_malloc_leaves_memory_to_malloc():
    """In a separate process: the settings cannot be undone."""
    code = """
import resource, torch, gptfast
from gptfast import ops
assert gptfast.tune_malloc()
x = torch.ones(1 << 22)
faults = []
for n in range(10):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.nn.functional.gelu(x)
    ops.gelu(x)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(min(faults))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100  # 8192 pages otherwise
    with pytest.raises(ValueError, match="tune_malloc: top_pad_megabytes is -1; expected 0 to 2047"):
        gptfast.tune_malloc(-1)


def test_results_freed_in_another_thread():
    results = [result(4) for _ in range(4)]
    thread = threading.Thread(target=results.clear)
    thread.start()
    thread.join()
    assert (result(4) == result(4)).all()


def test_results_outlive_the_limit():
    y = result(8)
    expected = y.clone()
    torch.ops.gptfast.keep_results(0)
    result(8)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("shape", [(3,), (4, 0), (0, 4), (2, 3, 5), (2, 1, 3, 4), (2, 1, 1, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_results_are_laid_out_as_those_of_torch(shape, dtype):
    expected = torch.empty(shape, dtype=dtype)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = torch.ops.gptfast.relu_squared_fwd(torch.randn(shape).to(dtype))
        assert (y.shape, y.stride(), y.dtype) == (expected.shape, expected.stride(), dtype)
        assert y.device.type == "cpu" and y.is_inference() == (mode is torch.inference_mode)


@pytest.mark.parametrize("op", sorted(SPECS))
def test_a_result_may_be_written_into(op: str):
    """As torch's own may, by `nn.ReLU(inplace=True)` or `y += update`: a view made inside of an autograd function refuses it."""
    one, constant = torch.ones((), requires_grad=True), SPECS[op].non_differentiable
    for case in cases(op):
        inputs = case.inputs(torch.float32)
        if sum(a.numel() for a in inputs if a is not None) > 200_000:
            continue
        leaves = [
            a.requires_grad_() if a is not None and a.is_floating_point() and n not in constant else a
            for n, a in enumerate(inputs)
        ]
        out = getattr(ops, op)(*leaves, **case.options)
        for y in out if isinstance(out, tuple) else (out,):
            if y.is_floating_point() and y.dim():
                y += one
                assert y.requires_grad
