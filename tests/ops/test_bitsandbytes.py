"""NF4 against the real bitsandbytes: the same codes to the bit, scales at least as near, each reads what the other wrote."""

from __future__ import annotations

import pytest
import torch

from gptfast import _nf4, ops

pytestmark = pytest.mark.usefixtures("nothing_compiled")
functional = pytest.importorskip("bitsandbytes.functional")


@pytest.fixture
def nothing_compiled():
    """bitsandbytes compiles what it has no C++ for, which takes seconds a shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def zeros_and_extremes() -> torch.Tensor:
    """Blocks of zeros, of subnormal, tiny and huge values, of one value and of values at the midpoints of two codes."""
    x = random(16, 64)
    x[0], x[1], x[2], x[3] = 0, x[1] * 1e-40, x[2] * 3e-38, x[3] * 1e37
    x[4], x[5] = 3.4e38, -1.5
    values = _nf4.nf4_values()
    x[6, :15], x[6, 15:] = (values[1:] + values[:-1]) / 2, 1.0
    x[7] = torch.where(torch.arange(64) == 5, 1.0, 0.0)
    return x


WEIGHTS = {
    "GPT-2's shape": lambda: random(768, 3072) * 0.02,  # two of 25 million codes differ by division
    "many": lambda: random(2048, 4096, seed=3) * 0.13,
    "extremes": zeros_and_extremes,
    "odd": lambda: random(7, 33),
    "one": lambda: random(1),
    "a short block of zeros": lambda: torch.cat((random(128), torch.zeros(3))),
    "a short block of subnormals": lambda: torch.cat((random(64), random(33) * 1e-40)),
    "all zeros": lambda: torch.zeros(5, 64),
    "bfloat16": lambda: random(100, 100).bfloat16(),
    "float16": lambda: random(100, 100).half(),
}


@pytest.mark.parametrize("block_size", [64, 128, 2048])
@pytest.mark.parametrize("name", WEIGHTS)
def test_codes_are_theirs_to_the_bit(name, block_size):
    weight = WEIGHTS[name]()
    theirs, state = functional.quantize_4bit(weight, blocksize=block_size, quant_type="nf4")
    ours = ops.quantize_nf4(weight, block_size=block_size)
    assert torch.equal(ours.codes, theirs.flatten())
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("name", WEIGHTS)
def test_double_quantization_is_at_least_as_near(name):
    weight = WEIGHTS[name]()
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = ops.quantize_nf4(weight, double=True)
    assert torch.equal(ours.codes, theirs.flatten())
    exact = ops.quantize_nf4(weight).absmax.double()
    their_scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    ours_off, theirs_off = (_nf4.nf4_absmax(*ours[1:]) - exact).abs(), (their_scales - exact).abs()
    overflown = ~state.offset.isfinite()  # their mean; ours is finite
    assert (ours_off <= theirs_off).all() or (overflown and ours_off.max() < exact.max())
    assert overflown or torch.equal(ours.nested_absmax, state.state2.absmax)
    assert overflown or torch.equal(ours.offset, state.offset)


def their_state(nf4, shape: torch.Size):
    """bitsandbytes' QuantState of our tensors: what its `from_dict` reads from a checkpoint."""
    state = {
        "absmax": nf4.absmax,
        "quant_map": _nf4.nf4_values(),
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": tuple(shape),
    }
    if nf4.nested_absmax is not None:
        state |= {
            "nested_absmax": nf4.nested_absmax,
            "nested_quant_map": _nf4.dynamic_values(),
            "nested_blocksize": _nf4.NESTED_BLOCK,
            "nested_dtype": "float32",
            "nested_offset": nf4.offset.item(),
        }
    return functional.QuantState.from_dict(state, torch.device("cpu"))


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", ["GPT-2's shape", "extremes", "odd", "a short block of zeros"])
def test_each_reads_what_the_other_wrote(name, double):
    weight = WEIGHTS[name]()
    ours = ops.quantize_nf4(weight, double=double)
    read = functional.dequantize_4bit(ours.codes[:, None], their_state(ours, weight.shape))
    back = ops.dequantize_nf4(*ours, shape=tuple(weight.shape))
    assert torch.equal(read.view(weight.shape), back)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    if double and not state.offset.isfinite():
        return
    scales = (state.absmax, state.state2.absmax, state.offset) if double else (state.absmax,)
    back = ops.dequantize_nf4(theirs, *scales, shape=tuple(weight.shape))
    assert torch.equal(back, functional.dequantize_4bit(theirs, state).view(weight.shape))
