"""Values of a `gptfast.GPTConfig` that contradict each other."""

from __future__ import annotations

import math
import re
from typing import Any


def check_shape(config: Any) -> None:
    """Raise ValueError for the first contradiction in a GPTConfig: it names the fields and what to do."""
    _check_heads(config)
    _check_pattern(config)
    _check_rotary(config)
    _check_norms(config)
    _check_experts(config)
    _check_direction(config)


def _check_heads(config: Any) -> None:
    if config.head_size is None and config.n_embd % config.n_head:
        raise ValueError(
            f"GPTConfig: n_embd is {config.n_embd} but n_head is {config.n_head}; n_embd must be a multiple "
            f"of n_head - try n_embd={_multiples_near(config.n_embd, config.n_head)}"
        )
    if config.head_dim > 256:
        raise ValueError(
            f"GPTConfig: n_embd={config.n_embd} over n_head={config.n_head} gives a head_dim of "
            f"{config.head_dim}; at most 256 is supported - use n_head >= {math.ceil(config.n_embd / 256)}"
        )
    if config.n_head % config.kv_heads:
        raise ValueError(
            f"GPTConfig: n_kv_head is {config.n_kv_head} but n_head is {config.n_head}; expected a divisor of n_head"
        )


def _check_pattern(config: Any) -> None:
    pattern = config.attention_pattern
    if pattern not in ("dense", "alternating"):
        if not isinstance(pattern, str) or not re.fullmatch("[SL]+", pattern):
            said = "dense, alternating, or letters S and L"
            raise ValueError(f"GPTConfig: attention_pattern is {pattern!r}; expected one of {said}")
        if len(pattern) > config.n_layer:
            raise ValueError(
                f"GPTConfig: attention_pattern has {len(pattern)} letters but n_layer is {config.n_layer}; expected at most "
                "one a layer"
            )
    if config.is_banded != (config.window is not None):
        raise ValueError(
            f"GPTConfig: attention_pattern is {pattern!r} with window={config.window}; "
            "'alternating' needs a window (such as 256), and so does a letter S, and 'dense' takes none"
        )


def _check_rotary(config: Any) -> None:
    rotary = ("rope_theta", "partial_rotary_factor", "rotary_layout", "rope_scaling")
    given = config.others(rotary)
    if given and config.position_embedding != "rotary":
        raise ValueError(
            f"GPTConfig: {given[0]} is for position_embedding='rotary', and it is {config.position_embedding!r}"
        )
    if config.position_embedding == "rotary" and (config.rotary_dim < 2 or config.rotary_dim % 2):
        raise ValueError(
            f"GPTConfig: partial_rotary_factor={config.partial_rotary_factor:g} of a head_dim of {config.head_dim} is "
            f"{config.rotary_dim} channels; pairs are rotated - expected an even number, at least 2"
        )


def _check_norms(config: Any) -> None:
    if config.norm_bias and (config.norm == "rms_norm" or not config.norm_affine):
        why = "an RMSNorm has none" if config.norm == "rms_norm" else "norm_affine=False leaves it out"
        raise ValueError(f"GPTConfig: norm_bias is True, and {why}; leave it out")
    if config.parallel_residual and config.norm_position != "pre":
        raise ValueError("GPTConfig: parallel_residual needs norm_position='pre', and it is 'post'")


def _check_experts(config: Any) -> None:
    E, k = config.n_expert, config.n_expert_per_tok
    if (E is None) != (k is None):
        raise ValueError(f"GPTConfig: n_expert is {E} and n_expert_per_tok is {k}; expected both or none")
    if E is not None and k > E:
        raise ValueError(f"GPTConfig: n_expert_per_tok is {k} but n_expert is {E}; expected at most as many")
    gated = {"n_expert": E, "swiglu_alpha": config.swiglu_alpha, "swiglu_limit": config.swiglu_limit}
    given = next((name for name, value in gated.items() if value is not None), None)
    if given and config.activation != "swiglu":
        raise ValueError(f"GPTConfig: {given} is for activation='swiglu', and it is {config.activation!r}")


def _check_direction(config: Any) -> None:
    if config.causal:
        given = config.others(("type_vocab_size", "head_transform", "pooler", "next_sentence_head"))
        if given:
            raise ValueError(f"GPTConfig: {given[0]} is for causal=False, as in BERT, and causal is True")
    elif config.is_banded:
        raise ValueError(
            f"GPTConfig: attention_pattern is {config.attention_pattern!r} with causal=False; no kernel has a band without a "
            "causal mask - use 'dense'"
        )
    if config.next_sentence_head and not config.pooler:
        raise ValueError("GPTConfig: next_sentence_head reads the pooler, and pooler is False; expected both")


def _multiples_near(n: int, of: int) -> str:
    below = n // of * of
    return f"{below} or {below + of}" if below else f"{of}"
