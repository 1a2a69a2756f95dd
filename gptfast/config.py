"""GPTConfig: the shape of a GPT, checked when it is made, and the published GPT-1, GPT-2 and GPT-3."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, fields, replace
from typing import Any

from gptfast._contradictions import check_shape
from gptfast._options import Real, Whole, check_fields, describe_fields, option
from gptfast._presets import PRESETS
from gptfast._rope import RopeScaling

_LARGEST = 2**31 - 1  # of a size: products of two fit in 64 bits
_DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
_BIASES = ("attn_bias", "attn_out_bias", "mlp_bias", "norm_bias")
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
        'Activation of the MLP: "gelu_tanh" (all published GPTs), "gelu" (exact), "relu", "silu", "quick_gelu", "tanh", '
        '"relu_squared" (nanochat), or "swiglu": silu of a gate times the rest, from twice as many rows (Llama).',
        allowed=("gelu_tanh", "gelu", "relu", "silu", "quick_gelu", "tanh", "relu_squared", "swiglu"),
    )
    attention_pattern: str = option(
        "dense",
        '"dense"; "alternating": layers 1, 3, 5, ... see only the last `window` positions (GPT-3); or letters, one a layer and '
        'from the first again after the last: S (short) for such a layer, L (long) for a dense one. "SL" is gpt-oss.',
    )
    window: int | None = option(
        None, 'Positions that a banded layer sees, its own included; None with "dense".', allowed=_SIZE
    )
    position_embedding: str = option(
        "learned",
        '"learned"; "sinusoidal": fixed, added to sqrt(n_embd) times the token embedding (Vaswani et al., arXiv '
        '1706.03762, sections 3.4 and 3.5); or "rotary": queries and keys are rotated (Su et al., arXiv 2104.09864).',
        allowed=("learned", "sinusoidal", "rotary"),
    )
    tie_weights: bool = option(True, "The head uses the token embedding matrix.")
    bias: bool = option(True, "Biases in the linear layers and LayerNorms.")
    layer_norm_epsilon: float = option(
        1e-5, "Added to the variance in LayerNorm, to the mean square in RMSNorm, > 0.", allowed=Real(above=0)
    )
    n_kv_head: int | None = option(
        None,
        "Heads of keys and values, a divisor of `n_head`: so many queries share one (grouped queries).",
        words="n_head",
        allowed=_SIZE,
    )
    head_size: int | None = option(
        None, "D, where it is not this share of `n_embd`.", words="n_embd / n_head", allowed=Whole(1, 256)
    )
    norm: str = option(
        "layer_norm", '"layer_norm", or "rms_norm" (Llama), which has no bias.', allowed=("layer_norm", "rms_norm")
    )
    norm_affine: bool = option(True, "The norms have weights; False in nanochat.")
    qk_norm: bool = option(False, "RMSNorm of each head's queries and keys, before rotary positions (Qwen3, nanochat).")
    embedding_norm: bool = option(False, "One more norm after the embedding (nanochat).")
    parallel_residual: bool = option(
        False, "Attention and MLP of a block both read its input, each through its own norm (GPT-NeoX)."
    )
    rope_theta: float = option(1e4, 'Longest wavelength / 2 pi of "rotary", in tokens.', allowed=Real(above=1))
    partial_rotary_factor: float = option(
        1.0, "Part of a head's channels that is rotated, the first ones, in (0, 1].", allowed=Real(above=0, most=1)
    )
    rotary_layout: str = option(
        "neox",
        'Which channels are rotated as a pair: "neox": one of each half (GPT-NeoX, Llama); "interleaved": neighbours (GPT-J); '
        '"reversed": as "neox", the other way round (nanochat).',
        allowed=("neox", "interleaved", "reversed"),
    )
    rope_scaling: RopeScaling | Mapping[str, Any] | None = option(
        None, "Scaling of rotary positions, as in transformers: rope_type linear, llama3 or yarn, factor, ..."
    )
    attn_bias: bool | None = option(None, "Biases of queries, keys and values.", words="bias")
    attn_out_bias: bool | None = option(None, "Bias of the projection after attention.", words="bias")
    mlp_bias: bool | None = option(None, "Biases of the MLP.", words="bias")
    norm_bias: bool | None = option(None, "Biases of the LayerNorms.", words="bias")
    attention_sinks: bool = option(
        False, "A learned logit a head in the denominator of the softmax, of no key (gpt-oss)."
    )
    attn_softcap: float | None = option(None, "c: attention logits x become c tanh(x / c).", allowed=Real(above=0))
    logit_softcap: float | None = option(
        None, "c: the logits x of the head become c tanh(x / c) (nanochat: 15).", allowed=Real(above=0)
    )
    n_expert: int | None = option(None, "Experts of each MLP; None: one MLP for all tokens.", allowed=_SIZE)
    n_expert_per_tok: int | None = option(None, "Experts that a token goes to, 1 .. `n_expert`.", allowed=_SIZE)
    swiglu_alpha: float | None = option(
        None, "SwiGLU as in gpt-oss: (up + 1) gate sigmoid(alpha gate), alpha 1.702.", allowed=Real(above=0)
    )
    swiglu_limit: float | None = option(
        None, "SwiGLU's gate is at most this, the rest within plus and minus this (gpt-oss: 7).", allowed=Real(above=0)
    )
    causal: bool = option(True, "Position t sees the positions up to t; False: all of them, as in BERT.")
    type_vocab_size: int | None = option(
        None, "Types of tokens, each with an embedding that is added (BERT: 2, first and second text).", allowed=_SIZE
    )
    head_transform: bool = option(
        False,
        "Linear layer, activation and norm before the head, which has biases (BERT's masked-language-model head).",
    )
    pooler: bool = option(False, "Linear layer and tanh of the first position, for heads of whole rows (BERT).")
    next_sentence_head: bool = option(False, "Two logits behind the pooler: the second text follows the first, or not.")
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
        object.__setattr__(self, "rope_scaling", RopeScaling.of(self.rope_scaling))
        check_fields("GPTConfig", self)
        check_shape(self)

    @classmethod
    def preset(cls, name: str, dropout: float | None = None, **overrides: Any) -> GPTConfig:
        """The configuration of a published model, with some fields changed; `gptfast info` lists them with their sizes.

        Args:
            name: gpt1; gpt2, gpt2-medium, gpt2-large, gpt2-xl; gpt3-125m, -350m, -760m, -1.3b, -2.7b, -6.7b,
                -13b, -175b; bert-base, bert-large; gpt-oss-20b, -120b; gptoss-tiny, of gpt-oss' form to train on a CPU.
            dropout: sets all three dropouts; None keeps the preset's.
            overrides: any field of GPTConfig.
        Raises:
            ValueError: unknown name.  TypeError: unknown field.
        """
        if name not in PRESETS:
            raise ValueError(f"GPTConfig.preset: unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
        shape = dict(PRESETS[name])
        rate = shape.pop("dropout", None)
        rates = {} if rate is None else dict.fromkeys(_DROPOUTS, rate)
        return cls(**{**rates, **shape, **_known(overrides), "dropout": dropout})

    def with_dropout(self, p: float) -> GPTConfig:
        """A copy with all three dropout rates set to p."""
        return replace(self, dropout=p)

    def replace(self, **overrides: Any) -> GPTConfig:
        """A checked copy with some fields changed (`dropout=` sets all three)."""
        return replace(self, **_known(overrides))

    @property
    def head_dim(self) -> int:
        """D, channels per head."""
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def attn_dim(self) -> int:
        """Channels of all heads together."""
        return self.n_head * self.head_dim

    @property
    def qkv_dim(self) -> int:
        """Channels of queries, keys and values together."""
        return (self.n_head + 2 * self.kv_heads) * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def inner_dim(self) -> int:
        """Hidden channels of the MLP."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def fc_dim(self) -> int:
        """Rows of the MLP's first matrix: with "swiglu" those of the gate, then as many others."""
        return 2 * self.inner_dim if self.activation == "swiglu" else self.inner_dim

    def has_bias(self, place: str) -> bool:
        """Whether a place has biases: "attn" (queries, keys, values), "attn_out", "mlp" or "norm"."""
        if place == "norm" and (self.norm == "rms_norm" or not self.norm_affine):
            return False
        own = getattr(self, f"{place}_bias")
        return self.bias if own is None else own

    def window_of(self, layer: int) -> int | None:
        """How many positions layer `layer` sees, or None for all of them."""
        if self.attention_pattern == "dense":
            return None
        pattern = "LS" if self.attention_pattern == "alternating" else self.attention_pattern
        return self.window if pattern[layer % len(pattern)] == "S" else None

    def beyond_gpt3(self) -> str | None:
        """The first difference from the networks of GPT-1 to GPT-3, as "field=value"; None: there is none."""
        if self.attention_pattern not in ("dense", "alternating"):
            return f"attention_pattern={self.attention_pattern!r}"
        if self.position_embedding == "rotary":
            return "position_embedding='rotary'"
        if self.activation == "swiglu":
            return "activation='swiglu'"
        return next(iter(self.others(NEWER)), None)

    def resolved(self) -> dict[str, Any]:
        """What decides the network, with every default resolved: two configs with equal values compute the same."""
        left = {name: getattr(self, name) for name in _NAMES if name not in (*_DROPOUTS, "bias", *_BIASES)}
        left |= {"n_kv_head": self.kv_heads, "head_size": self.head_dim, "n_inner": self.inner_dim}
        left |= {f"{place}_bias": self.has_bias(place) for place in ("attn", "attn_out", "mlp", "norm")}
        left["attention_pattern"] = "".join("L" if self.window_of(n) is None else "S" for n in range(self.n_layer))
        return left

    def stored(self) -> dict[str, Any]:
        """The fields for a file, without those of `NEWER` that say what is so without them."""
        left = {name: getattr(self, name) for name in _NAMES}
        left = {name: value for name, value in left.items() if name not in NEWER or value != _default(name)}
        scaling = RopeScaling.of(self.rope_scaling)
        return left if scaling is None else {**left, "rope_scaling": scaling.to_dict()}

    @property
    def is_banded(self) -> bool:
        """Whether a layer may be banded."""
        return self.attention_pattern == "alternating" or "S" in self.attention_pattern

    def others(self, names: tuple[str, ...]) -> list[str]:
        """Those of these fields that are not as in a GPT-2, as "field=value"."""
        same = {"n_kv_head": self.n_head, "head_size": self.n_embd / self.n_head}
        same |= dict.fromkeys(_BIASES, self.bias)
        found = {name: getattr(self, name) for name in names}
        return [f"{n}={x!r}" for n, x in found.items() if x not in (_default(n), same.get(n, _default(n)))]


def _default(name: str) -> Any:
    return GPTConfig.__dataclass_fields__[name].default


def _known(overrides: dict[str, Any]) -> dict[str, Any]:
    for name in overrides:
        if name not in (*_NAMES, "dropout"):
            raise TypeError(f"GPTConfig has no field {name!r}; it has {', '.join(_NAMES)}, dropout")
    return overrides


_NAMES = tuple(f.name for f in fields(GPTConfig))
NEWER = _NAMES[_NAMES.index("n_kv_head") :]  # fields that came after GPT-3, which old files do not have
