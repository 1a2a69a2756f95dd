"""A checkpoint folder of gpt-oss with its experts in MXFP4 as a GGUF file, for llama.cpp to compute with the same weights.

    python scripts/gguf_checkpoint.py FOLDER FILE.gguf [--dense q8_0]

Experts keep their bits, in ggml's order of them; the other matrices stay bfloat16, or are rounded to Q8_0; router, norms and biases are
in float32. There is no vocabulary: token ids go in, logits come out. Tensors are written one after another; the largest, the
embedding, is the memory that this takes. Needs `pip install gguf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from gptfast._files import atomic_path
from gptfast.checkpoints.weight_files import StoredTensor, open_weights, weight_files
from gptfast.config import GPTConfig
from gptfast.models.stored import StoredModel

NAMES = {
    **{"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output", "router": "ffn_gate_inp"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "post_attention_norm"},
    **{"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"},
}
FIXED = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # llama.cpp has no others
ROWS = 4096  # of a matrix, rounded at once


class Made(NamedTuple):
    """A tensor of the file. shape: of its bytes. make: they."""

    name: str
    type: Type
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def of_floats(name: str, x: StoredTensor, type: Type, halves: slice = slice(None)) -> Made:
    """A tensor that is stored in floats. halves: of its last dimension."""
    (block, size), width = gguf.GGML_QUANT_SIZES[type], len(range(x.shape[-1])[halves])

    def make() -> np.ndarray:
        whole = x.read()[..., halves]
        if type == Type.F32:
            return whole.float().contiguous().numpy().view(np.uint8)
        if type == Type.BF16:
            return whole.bfloat16().contiguous().view(torch.uint8).numpy()
        return np.concatenate([gguf.quants.quantize(part.float().numpy(), type) for part in whole.split(ROWS)])

    return Made(name, type, (*x.shape[:-1], width // block * size), make)


def of_codes(name: str, blocks: StoredTensor, scales: StoredTensor, rows: slice = slice(None)) -> Made:
    """Experts: in each block a scale, then codes 0 to 15 in the lower halves of 16 bytes and 16 to 31 in the upper ones."""
    E, count, groups, _ = blocks.shape
    shape = (E, len(range(count)[rows]), groups * 17)

    def make() -> np.ndarray:
        found = np.empty((*shape[:2], groups, 17), np.uint8)
        for e in range(E):
            b = blocks.read(e, e + 1)[0, rows].numpy()
            codes = np.stack((b & 15, b >> 4), -1).reshape(*b.shape[:2], 32)
            found[e, ..., 0] = scales.read(e, e + 1)[0, rows].numpy()
            found[e, ..., 1:] = codes[..., :16] | codes[..., 16:] << 4
        return found.reshape(shape)

    return Made(name, Type.MXFP4, shape, make)


def tensors(stored: dict[str, StoredTensor], dense: Type) -> Iterator[Made]:
    """What lies in the GGUF file, of the tensors of the checkpoint by name."""
    for key, x in stored.items():
        *path, own, kind = key.split(".")
        to, scales = f"blk.{path[2]}." if "layers" in path else "", stored.get(key.replace("_blocks", "_scales"))
        if kind.startswith("gate_up_proj"):
            for n, name in enumerate(("ffn_gate_exps", "ffn_up_exps")):  # row by row in turn
                if kind.endswith("_bias"):
                    yield of_floats(f"{to}{name}.bias", x, Type.F32, slice(n, None, 2))
                elif kind.endswith("_blocks") and scales:
                    yield of_codes(f"{to}{name}.weight", x, scales, slice(n, None, 2))
        elif kind == "down_proj_blocks" and scales:
            yield of_codes(f"{to}ffn_down_exps.weight", x, scales)
        elif kind == "down_proj_bias":
            yield of_floats(f"{to}ffn_down_exps.bias", x, Type.F32)
        elif kind != "down_proj_scales":
            name, kind = ("attn_sinks", "weight") if kind == "sinks" else (NAMES[own], kind)
            plain = kind == "bias" or name.endswith(("norm", "inp", "sinks"))
            yield of_floats(f"{to}{name}.{kind}", x, Type.F32 if plain else dense)


def write_settings(w: Any, c: GPTConfig) -> None:
    for add, value in (
        *((w.add_block_count, c.n_layer), (w.add_context_length, c.block_size), (w.add_vocab_size, c.vocab_size)),
        *((w.add_embedding_length, c.n_embd), (w.add_feed_forward_length, c.inner_dim)),
        *((w.add_expert_feed_forward_length, c.inner_dim), (w.add_expert_count, c.n_expert)),
        *((w.add_expert_used_count, c.n_expert_per_tok), (w.add_head_count, c.n_head)),
        *((w.add_head_count_kv, c.kv_heads), (w.add_key_length, c.head_dim), (w.add_value_length, c.head_dim)),
        *((w.add_layer_norm_rms_eps, c.layer_norm_epsilon), (w.add_rope_freq_base, c.rope_theta)),
        *((w.add_sliding_window, c.window), (w.add_tokenizer_model, "none")),
    ):
        add(value)
    if c.rope_scaling:
        w.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        w.add_rope_scaling_factor(c.rope_scaling.factor)
        w.add_rope_scaling_orig_ctx_len(c.rope_scaling.original_max_position_embeddings)


def write(folder: Path, file: Path, dense: Type) -> None:
    """Raises ValueError: no gpt-oss, or one that llama.cpp cannot express."""
    c = StoredModel(folder).config
    stored = {key: x.stored(key) for x in map(open_weights, weight_files(folder)) for key in x.shapes}
    different = [f"{name} is {getattr(c, name)}" for name, value in FIXED.items() if getattr(c, name) != value]
    if any((c.window_of(n) is None) != bool(n % 2) for n in range(c.n_layer)):
        different.append("its layers are not banded and dense in turn")
    if different or not any(key.endswith("_blocks") for key in stored):
        what = "; ".join(different) or "no experts in MXFP4"
        raise ValueError(f"{folder}: {what}; expected a checkpoint of gpt-oss as it was published")
    made = list(tensors(stored, dense))
    with atomic_path(file) as temporary:
        w = gguf.GGUFWriter(temporary, "gpt-oss")
        write_settings(w, c)
        for name, type, shape, _ in made:
            w.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), type)
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_ti_data_to_file()
        for one in made:
            w.write_tensor_data(one.make())
        w.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--dense", choices=("bf16", "q8_0"), default="bf16", help="of matrices that no expert has")
    args = parser.parse_args()
    write(args.folder, args.file, Type[args.dense.upper()])
    print(f"{args.file}: {args.file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
