"""What Triton's compiler makes of every kernel for three GPUs, none of which is present: that it compiles them, tensor-core and TMA
instructions, shared memory."""

from __future__ import annotations

import re
from unittest import mock

import pytest
import torch

from gptfast import ops

pytest.importorskip("triton")


def row_kernels() -> None:
    from gptfast.triton import (
        cross_entropy,
        dequantize_nf4,
        dropout,
        embedding,
        gelu,
        layer_norm,
        relu_squared,
        rms_norm,
        rotary,
        sample,
        swiglu,
    )

    x, w, f = torch.empty(64, 768).bfloat16(), torch.empty(768).bfloat16(), torch.empty(64)
    ids, lse = torch.zeros(64, dtype=torch.int64), torch.empty(64, 2)
    for tanh in (True, False):
        gelu.gelu_fwd(x, w, tanh)
        gelu.gelu_bwd(x, x, w, tanh)
    layer_norm.layer_norm_fwd(x, w, w, 1e-5, 1)
    layer_norm.layer_norm_bwd(x, x, w, torch.empty(2, 64), f, 0)
    layer_norm.add_layer_norm_fwd(x, x.float(), w, w, 1e-5, 0.1, 1, 2, 1)
    layer_norm.add_layer_norm_bwd(x, x, x, w, torch.empty(2, 64), f, 0, 1, 1, 0.1, 1, 2)
    rms_norm.rms_norm_fwd(x, w, 1e-5, 1)
    rms_norm.rms_norm_bwd(x, x, None, f)
    rms_norm.add_rms_norm_fwd(x, x.float(), w, 1e-5, 0.1, 1, 2, 1)
    rms_norm.add_rms_norm_bwd(x, x, x, w, f, 1, 1, 0.1, 1, 2)
    relu_squared.relu_squared_bwd(relu_squared.relu_squared_fwd(x), x)
    for up, layout in ((x, False), (None, False), (None, True)):
        swiglu.swiglu_bwd(swiglu.swiglu_fwd(x, up, layout, 1.7, 1.0, 7.0), x, up, layout, 1.7, 1.0, 7.0)
    for layout in (False, True):
        rotary.rotary(x.view(1, 4, 16, 768), f.view(16, 4), f.view(16, 4), None, layout, layout)
    dropout.dropout(x, 0.1, 1, 2)
    embedding.embedding_fwd(ids, x, x, None)
    embedding.embedding_bwd(x, ids, ids, x)
    cross_entropy.cross_entropy_fwd(x, ids, -100, 0.1)
    cross_entropy.cross_entropy_bwd(f, x, ids, lse, -100, 0.1)
    cross_entropy.cross_entropy_in_place(x, ids, None, -100, 0.0)
    nf4 = ops.quantize_nf4(torch.empty(64, 768).fill_(1), double=True)
    dequantize_nf4.dequantize_nf4(*nf4, [64, 768], 64, torch.bfloat16)
    dequantize_nf4.dequantize_nf4(nf4.codes, torch.empty(768), None, None, [64, 768], 64, torch.float16)
    with mock.patch.object(sample, "_check"):  # nothing has run: the tokens are whatever was in memory
        sample.sample(x, 1.0, 5, 0.9, 1, ids, ids)
        sample.sample_rows(x, torch.zeros(64, 4, dtype=torch.int64), ids, ids)


def attention_kernels(D: int, dtype: torch.dtype, dropout_p: float, group: int = 1) -> None:
    from gptfast.triton import causal_attention, causal_attention_bwd

    q, statistics = torch.empty(1, 4, 1024, D, dtype=dtype), torch.empty(2, 1, 4, 1024)
    k, options = q[:, : 4 // group], (None, None, True, 0.1, dropout_p, 1, 2, 0)
    causal_attention.causal_attention_fwd(q, k, k, *options)
    causal_attention.causal_attention_fwd(q[:, :, :1], k, k, *options)  # decoding: keys split among programs
    causal_attention_bwd.causal_attention_bwd(q, q, k, k, q, statistics, *options)


def quantized_kernels(dtype: torch.dtype) -> None:
    from gptfast.triton import quantized_linear

    for format, size in (("int8", 32), ("int4", 128), ("nf4", 64), ("mxfp4", 32)):
        groups = 768 // size
        codes = torch.empty(64, 768, dtype=torch.int8) if format == "int8" else torch.empty(64, 384, dtype=torch.uint8)
        scale_dtype = {"nf4": torch.float32, "mxfp4": torch.uint8}.get(format, torch.float16)
        scales = torch.empty(64, groups, dtype=scale_dtype)
        for M in (1, 200):
            x, dy = torch.empty(M, 768, dtype=dtype), torch.empty(M, 64, dtype=dtype)
            quantized_linear.quantized_linear_fwd(x, codes, scales, None, format, size)
            quantized_linear.quantized_linear_bwd(dy, codes, scales, format, size, 768)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_row_kernels_compile(target):
    from tests.support.triton_targets import TARGETS, compiled_for

    with compiled_for(target) as kernels:
        row_kernels()
    assert len(kernels) >= 20
    assert all(kernel.metadata.shared <= TARGETS[target][1] for kernel in kernels)


TENSOR_CORES = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "gfx942": "v_mfma"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("D", "dropout_p", "target", "group"),
    [
        (64, 0.1, "sm_80", 2),
        (64, 0.1, "sm_90", 1),
        (64, 0.1, "gfx942", 1),
        (128, 0.0, "sm_90", 4),
        (128, 0.0, "gfx942", 2),
        (128, 0.1, "gfx942", 2),
    ],
)
def test_attention_compiles_to_tensor_core_instructions(D, dropout_p, target, group, monkeypatch):
    from tests.support.triton_targets import TARGETS, compiled_for

    monkeypatch.setenv("GPTFAST_TRITON_TUNE", "0")
    with compiled_for(target) as kernels:
        attention_kernels(D, torch.bfloat16, dropout_p, group)
    assert {k.metadata.name for k in kernels} == {"_fwd_kernel", "_dq_kernel", "_dkdv_kernel", "_join_kernel"}
    room = TARGETS["sm_80" if target == "sm_90" else target][1]  # these tiles are sm_80's too
    for kernel in kernels:
        name, code = kernel.metadata.name, kernel.asm["amdgcn" if target == "gfx942" else "ptx"]
        assert kernel.metadata.shared <= room, name
        assert name == "_join_kernel" or re.search(TENSOR_CORES[target] + "|mma.sync", code), name
    assert any(re.search(TENSOR_CORES[target], k.asm.get("ptx", k.asm.get("amdgcn"))) for k in kernels)


@pytest.mark.slow
def test_a_tiling_of_backward_fits_gpus_of_99_kilobytes(monkeypatch):
    """At head dim 128 the tiles that are expected to be the fastest do not; `fastest` skips them."""
    from gptfast.triton import causal_attention_bwd
    from tests.support.triton_targets import TARGETS, compiled_for

    monkeypatch.setattr(causal_attention_bwd, "fastest", lambda kernel, shape_class, candidates, launch: candidates[-1])
    q, statistics = torch.empty(1, 2, 512, 128, dtype=torch.bfloat16), torch.empty(2, 1, 2, 512)
    with compiled_for("sm_86") as kernels:
        causal_attention_bwd.causal_attention_bwd(q, q, q, q, q, statistics, None, None, True, 0.1, 0.1, 1, 2, 0)
    assert [k.metadata.name for k in kernels] == ["_dq_kernel", "_dkdv_kernel"]
    assert all(k.metadata.shared <= TARGETS["sm_86"][1] for k in kernels)


@pytest.mark.slow
@pytest.mark.parametrize("D", [64, 128])
def test_attention_by_tma_compiles(D, monkeypatch):
    """On Hopper the measurement has a tiling to choose whose loads are bulk copies of tensors."""
    from tests.support.triton_targets import TARGETS, compiled_for, take_tma

    take_tma(monkeypatch)
    with compiled_for("sm_90") as kernels:
        attention_kernels(D, torch.bfloat16, 0.0)
    for kernel in kernels:
        name, code = kernel.metadata.name, kernel.asm["ptx"]
        assert kernel.metadata.shared <= TARGETS["sm_90"][1], name
        assert name == "_join_kernel" or "cp.async.bulk.tensor" in code, name
    assert sum("wgmma.mma_async" in k.asm["ptx"] for k in kernels) == 3  # all but decoding and joining


def test_what_tma_can_load(monkeypatch):
    """Elsewhere, and for tensors that it cannot address, no tiling asks for it."""
    from gptfast.triton._attention import loadable_by_tma
    from gptfast.triton.causal_attention import block_candidates
    from tests.support.triton_targets import compiled_for

    x = torch.empty(2, 9, 3, 4, 64, dtype=torch.float16)[:, :, 1].transpose(1, 2)
    odd = torch.empty(2, 4, 9, 65, dtype=torch.float16)[..., 1:]  # rows of 130 bytes
    with compiled_for("sm_90"):
        assert loadable_by_tma(x, x)
        assert not loadable_by_tma(x, odd)
        assert not loadable_by_tma(x, x[..., 4:])  # begins 8 bytes late
        assert not loadable_by_tma(x.expand(2, 4, 9, 64), x[:1].expand(2, 4, 9, 64))  # a stride of 0
        assert not loadable_by_tma(x.float())
    for target in ("sm_80", "gfx942"):
        with compiled_for(target):
            assert not loadable_by_tma(x)
    for D in (64, 128, 256):
        assert any(b.tma for b in block_candidates(D, x.dtype, 512, True))
        assert not any(b.tma for b in block_candidates(D, x.dtype, 512, False))


@pytest.mark.slow
@pytest.mark.parametrize("target", TENSOR_CORES)
def test_quantized_linear_compiles_to_tensor_core_instructions(target, monkeypatch):
    from tests.support.triton_targets import TARGETS, compiled_for

    monkeypatch.setenv("GPTFAST_TRITON_TUNE", "0")
    with compiled_for(target) as kernels:
        quantized_kernels(torch.bfloat16)
    assert {k.metadata.name for k in kernels} == {"_fwd_kernel", "_bwd_kernel", "_sum_rows_kernel"}
    for kernel in kernels:
        assert kernel.metadata.shared <= TARGETS[target][1]
        code = kernel.asm["amdgcn" if target == "gfx942" else "ptx"]
        found = re.search(TENSOR_CORES[target] + r"|mma\.sync", code)  # wgmma takes 64 rows
        assert found or kernel.metadata.name == "_sum_rows_kernel", kernel.metadata.name


def test_one_compilation_serves_all_numbers_of_a_run(monkeypatch):
    """Seeds, offsets and windows: a step of training must not stop for the compiler."""
    from gptfast.triton import causal_attention, dropout, layer_norm
    from tests.support.triton_targets import compiled_for

    monkeypatch.setenv("GPTFAST_TRITON_TUNE", "0")
    q, w = torch.empty(1, 2, 64, 64, dtype=torch.float16), torch.empty(64)
    with compiled_for("sm_90") as kernels:
        for window, p, seed, offset in ((1, 0.1, 1, 1), (16, 0.5, 16, 16), (5, 0.25, 7, 0)):
            causal_attention.causal_attention_fwd(q, q, q, None, None, True, 0.1, p, seed, offset, window)
            dropout.dropout(q, p, seed, offset)
            layer_norm.add_layer_norm_fwd(q, q, w, None, 1e-5, p, seed, offset, 2)
    assert len(kernels) == 9 and len({kernel.hash for kernel in kernels}) == 3
