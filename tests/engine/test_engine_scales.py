"""Quantised formats of the engine with weights whose scales fp16 does not hold: such a matrix is stored divided by a power of
two, which changes no other bit."""

from __future__ import annotations

import copy
import json
import math
import struct
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast.backend import has_cpu_ops
from gptfast.engine import FORMATS, load
from gptfast.engine.exponents import LARGEST, exponent_of, extremes, quantised
from tests.support.engine_models import ids_of, model_of

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
QUANTISED = [name for name in FORMATS if quantised(name)]
MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def scaled(name: str, factors: dict[str, float]) -> gptfast.GPT:
    """A model of which these modules' weights (of every layer) are multiplied."""
    model = copy.deepcopy(model_of(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters(remove_duplicate=False):
            for part, factor in factors.items():
                if key.endswith(f"{part}.weight"):
                    parameter.mul_(factor)
    return model


def error(model: gptfast.GPT, dtype: str, ids: Tensor, exact: Tensor) -> float:
    """Of the logits, relative to their spread."""
    logits = model.compile_for_inference(dtype).logits(ids)
    return float((logits.double() - exact).norm() / exact.norm())


def exact_logits(model: gptfast.GPT, ids: Tensor) -> Tensor:
    wide = gptfast.GPT(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    with torch.no_grad(), gptfast.backend("eager"):
        return wide(ids)[0] if isinstance(wide(ids), tuple) else wide(ids)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("power", [-30, -5, -4, 9, 30])
def test_a_head_of_any_size(power, dtype):
    """The logits are as exact as those of the head at its usual size; they were all 0, or cut off."""
    ids = ids_of("gpt3")[:1, :9]
    usual, other = model_of("gpt3"), scaled("gpt3", {"lm_head": 10.0**power})
    expected = exact_logits(usual, ids)
    before = error(usual, dtype, ids, expected)
    assert error(other, dtype, ids, exact_logits(other, ids)) <= 1.1 * before + 1e-6


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("part", [*MATRICES, "wte"])
def test_powers_of_two_change_no_bit_of_the_codes(part, dtype):
    """Each kind of matrix, 2^40 smaller and larger: the packed codes are the same, and the scales but for the power."""
    small, large = (scaled("gpt2", {part: 2.0**power}).compile_for_inference(dtype) for power in (-40, 40))
    names = [name for name in small._exponents if name.endswith(f"{part}.weight")]
    assert len(names) == (1 if part == "wte" else 2)
    for name in names:
        assert large._exponents[name] == small._exponents[name] + 80
    assert bytes(memoryview(small._weights)) == bytes(memoryview(large._weights))


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("power", [-6, 6])
def test_layers_that_undo_each_other(power, dtype):
    """A third of c_attn, the values, and c_proj: groups of very different sizes in one matrix."""
    ids = ids_of("gpt3")[:1, :9]
    model = copy.deepcopy(model_of("gpt3"))
    C = model.config.n_embd
    with torch.no_grad():
        for block in model.h:
            block.attn.c_attn.weight[2 * C :].mul_(10.0**power)
            block.attn.c_proj.weight.mul_(10.0**-power)
    usual = model_of("gpt3")
    before = error(usual, dtype, ids, exact_logits(usual, ids))
    options = {"cache_dtype": "float32"}  # values of 1e6 are none of fp16
    exact = exact_logits(model, ids)
    logits = model.compile_for_inference(dtype, **options).logits(ids)
    assert float((logits.double() - exact).norm() / exact.norm()) <= 1.3 * before + 1e-6


def test_exponents():
    """0 where fp16 holds every scale; else the largest value comes to just below 2^15. Groups of zeros have no scale."""
    usual = torch.full((4, 70), 0.5)
    assert exponent_of("w", *extremes(usual)) == 0 and exponent_of("w", *extremes(torch.zeros(3, 5))) == 0
    usual[1] = 0
    assert exponent_of("w", *extremes(usual)) == 0
    for largest, others in ((1.0, 1e-3), (1e9, 1.0), (1e-20, 1e-20), (2.0**15, 1.0), (3e38, 3e38)):
        weight = torch.full((4, 70), others)
        weight[2, 69] = -largest
        exponent = exponent_of("w", *extremes(weight))
        assert exponent != 0 and 2**14 <= largest / 2.0**exponent < 2**15 + 1 and exponent <= LARGEST
    with pytest.raises(
        ValueError, match=r"the largest value of h\.0\.w is 1e-37, too small for this format; use bfloat16"
    ):
        exponent_of("h.0.w", *extremes(torch.full((1, 32), 1e-37)))


def test_too_small_weights_name_their_matrix():
    model = scaled("gpt2", {"h.1.mlp.c_fc": 1e-37})
    with pytest.raises(ValueError, match=r"largest value of h\.1\.mlp\.c_fc\.weight is .*; use bfloat16 or float32"):
        model.compile_for_inference("q4")
    assert model.compile_for_inference("bfloat16").logits([1, 2]).isfinite().all()


@pytest.mark.parametrize("dtype", QUANTISED)
def test_round_trip(dtype, tmp_path: Path):
    compiled = scaled("gpt3", {"lm_head": 1e-5, "mlp.c_proj": 1e9}).compile_for_inference(dtype)
    assert {key.rsplit(".", 2)[-2] for key in compiled._exponents} >= {"lm_head", "c_proj"}
    compiled.save(tmp_path / "model.gptfast")
    assert struct.unpack_from("<I", (tmp_path / "model.gptfast").read_bytes(), 8) == (3,)
    again = load(tmp_path / "model.gptfast", verify=True)
    for other in (again, again.with_threads(2)):
        assert torch.equal(other.logits([1, 2, 3]), compiled.logits([1, 2, 3]))


def rewritten(path: Path, change) -> Path:
    """The file with another header, of the same length."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    description = json.loads(data[20 : 20 + length])
    change(description)
    header = json.dumps(description).encode().ljust(length)
    assert len(header) == length
    path.write_bytes(data[:16] + struct.pack("<I", zlib.crc32(header)) + header + data[20 + length :])
    return path


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda e: e.update({"lm_head.weight": 200}), "'exponents' in its header is"),
        (lambda e: e.update({"lm_head.weight": 1.5}), "'exponents' in its header is"),
        (lambda e: e.update({"lm_head.weight": True}), "'exponents' in its header is"),
        (lambda e: e.update({"ln_f.bias": 3}), "has an exponent for 'ln_f.bias', which is none of its quantised"),
        (lambda e: e.update({"h.99.x": 3}), "has an exponent for 'h.99.x'"),
    ],
)
def test_exponents_of_a_file_are_checked(change, match, tmp_path: Path):
    path = tmp_path / "model.gptfast"
    scaled("gpt3", {"lm_head": 1e-5}).compile_for_inference("int8").save(path)
    with pytest.raises(ValueError, match=match):
        load(rewritten(path, lambda description: change(description["exponents"])))


def test_files_without_exponents_are_of_the_old_version(tmp_path: Path):
    """As all that are written before; who reads these alone reads them."""
    for dtype in ("float32", "bfloat16"):
        compiled = scaled("gpt2", {"mlp.c_fc": 1e-9}).compile_for_inference(dtype)
        compiled.save(tmp_path / "model.gptfast")
        assert struct.unpack_from("<I", (tmp_path / "model.gptfast").read_bytes(), 8) == (2,)
        assert not compiled._exponents and math.isfinite(float(compiled.logits([1]).sum()))
