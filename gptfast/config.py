"""GPTConfig: the shape of a GPT, checked when it is made, and the published GPT-1, GPT-2 and GPT-3."""

from __future__ import annotations

import math
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any

from gptfast._options import Real, Whole, check_fields, describe_fields, option

_LARGEST = 2**31 - 1  # of a size: products of two fit in 64 bits
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_SIZE = Whole(1, _LARGEST)
_PROBABILITY = Real(0, most=1, noun="a probability")


@describe_fields
@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the shape and the arithmetic of a `GPT`; without arguments it is GPT-2 (124M).

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or two that contradict each other.
    """

    n_layer: int = option(12, "Number of blocks.", allowed=_SIZE)
    n_head: int = option(12, "Attention heads of a block.", allowed=_SIZE)
    n_embd: int = option(768, "C, channels: the width of the model, a multiple of `n_head`.", allowed=_SIZE)
    block_size: int = option(1024, "T, the longest sequence in tokens; longer costs time.", allowed=_SIZE)
    vocab_size: int = option(50257, "V, the number of token ids.", allowed=_SIZE)
    embd_pdrop: float = option(0.1, "Dropout after the embedding, a probability in [0, 1].", allowed=_PROBABILITY)
    attn_pdrop: float = option(0.1, "Dropout of the attention probabilities, in [0, 1].", allowed=_PROBABILITY)
    resid_pdrop: float = option(
        0.1, "Dropout of each branch before it is added to the residual, in [0, 1].", allowed=_PROBABILITY
    )
    n_inner: int | None = option(None, "Hidden channels of the MLP.", words="4 * n_embd", allowed=_SIZE)
    norm_position: str = option(
        "pre",
        '"pre" normalises the input of each branch (GPT-2, GPT-3), "post" the sum after it (GPT-1).',
        allowed=("pre", "post"),
    )
    final_norm: bool = option(True, "One more LayerNorm before the head (GPT-2, GPT-3).")
    activation: str = option(
        "gelu_tanh",
        'Activation of the MLP: "gelu_tanh" (all published GPTs), "gelu" (exact), "relu", "silu", "quick_gelu" or "tanh".',
        allowed=("gelu_tanh", "gelu", "relu", "silu", "quick_gelu", "tanh"),
    )
    attention_pattern: str = option(
        "dense",
        '"dense", or "alternating": layers 1, 3, 5, ... see only the last `window` positions (GPT-3).',
        allowed=("dense", "alternating"),
    )
    window: int | None = option(
        None, 'Positions that a banded layer sees, its own included; None with "dense".', allowed=_SIZE
    )
    position_embedding: str = option(
        "learned",
        '"learned", or "sinusoidal": fixed, added to sqrt(n_embd) times the token embedding (Vaswani et al., arXiv '
        "1706.03762, sections 3.4 and 3.5).",
        allowed=("learned", "sinusoidal"),
    )
    tie_weights: bool = option(True, "The head uses the token embedding matrix.")
    bias: bool = option(True, "Biases in the linear layers and LayerNorms.")
    layer_norm_epsilon: float = option(1e-5, "Added to the variance in LayerNorm, > 0.", allowed=Real(above=0))
    dropout: InitVar[float | None] = option(
        None,
        "Part of the activations that training sets to 0 at random, in [0, 1]. It keeps a model from memorising a small text "
        "(try 0.1 or 0.2 where the validation loss rises again).",
        words="embd_pdrop, attn_pdrop and resid_pdrop, which it sets together",
    )

    def __post_init__(self, dropout: float | None) -> None:
        if dropout is not None:
            for name in _DROPOUTS:
                object.__setattr__(self, name, dropout)
        check_fields("GPTConfig", self)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"GPTConfig: n_embd is {self.n_embd} but n_head is {self.n_head}; n_embd must be a multiple "
                f"of n_head - try n_embd={_multiples_near(self.n_embd, self.n_head)}"
            )
        if self.head_dim > 256:
            raise ValueError(
                f"GPTConfig: n_embd={self.n_embd} over n_head={self.n_head} gives a head_dim of "
                f"{self.head_dim}; at most 256 is supported - use n_head >= {math.ceil(self.n_embd / 256)}"
            )
        if (self.attention_pattern == "alternating") != (self.window is not None):
            raise ValueError(
                f"GPTConfig: attention_pattern is {self.attention_pattern!r} with window={self.window}; "
                "'alternating' needs a window (such as 256) and 'dense' takes none"
            )

    @classmethod
    def preset(cls, name: str, dropout: float | None = None, **overrides: Any) -> GPTConfig:
        """The configuration of a published model, with some fields changed.

        Args:
            name: gpt1; gpt2, gpt2-medium, gpt2-large, gpt2-xl; gpt3-125m, -350m, -760m, -1.3b, -2.7b, -6.7b,
                -13b, -175b (see `PRESETS` for where the numbers come from).
            dropout: sets all three dropouts; None keeps the preset's.
            overrides: any field of GPTConfig.
        Raises:
            ValueError: unknown name.  TypeError: unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"GPTConfig.preset: unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], "dropout": dropout, **_known(overrides)})

    def with_dropout(self, p: float) -> GPTConfig:
        """A copy with all three dropout rates set to p."""
        return replace(self, dropout=p)

    def replace(self, **overrides: Any) -> GPTConfig:
        """A checked copy with some fields changed (`dropout=` sets all three)."""
        return replace(self, **_known(overrides))

    @property
    def head_dim(self) -> int:
        """D, channels per head."""
        return self.n_embd // self.n_head

    @property
    def inner_dim(self) -> int:
        """Hidden channels of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def window_of(self, layer: int) -> int | None:
        """How many positions layer `layer` sees, or None for all of them."""
        return self.window if layer % 2 == 1 else None


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(GPTConfig)] + ["dropout"]
    for name in overrides:
        if name not in names:
            raise TypeError(f"GPTConfig has no field {name!r}; it has {', '.join(names)}")
    return overrides


def _multiples_near(n: int, of: int) -> str:
    below = n // of * of
    return f"{below} or {below + of}" if below else f"{of}"


def _gpt3(n_layer: int, n_embd: int, n_head: int, **others: Any) -> dict[str, Any]:
    return {
        "n_layer": n_layer,
        "n_embd": n_embd,
        "n_head": n_head,
        "block_size": 2048,
        "attention_pattern": "alternating",
        "window": 256,
        "dropout": 0.0,
        **others,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gpt1": {"block_size": 512, "vocab_size": 40478, "norm_position": "post", "final_norm": False},
    "gpt2": {},
    "gpt2-medium": {"n_layer": 24, "n_head": 16, "n_embd": 1024},
    "gpt2-large": {"n_layer": 36, "n_head": 20, "n_embd": 1280},
    "gpt2-xl": {"n_layer": 48, "n_head": 25, "n_embd": 1600},
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96, tie_weights=False),
}
"""Shapes from the papers: Radford et al. 2018 (GPT-1), Radford et al. 2019 (GPT-2), Brown et al., arXiv
2005.14165, Table 2.1 (GPT-3). Where the GPT-3 paper leaves a choice:

* its XL row (2048 channels, 24 heads of 128) and its 13B row (5140 channels, 40 heads of 128) contradict
  themselves; n_head * head_dim = n_embd and the printed parameter counts hold with 16 heads and with 5120
  channels;
* it does not say whether the head is tied. The printed counts of the small models fit only a tied head (125M
  would be 164M untied), so 125M to 13B are tied as GPT-2 is; 175B is untied, as the usual table lists it:
  617M each for the embedding and the unembedding, 175.2B in all (tied it would be 174.6B);
* it gives no width for the banded layers; 256 is that of GPT-Neo's local layers. Dropout is 0: less than one
  epoch.
"""
