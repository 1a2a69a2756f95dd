"""How rotary positions are scaled to a longer context than that of the training: the forms of transformers' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptfast._checks import check_count, check_real

_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
TYPES = tuple(_REQUIRED)
_OPTIONAL = {"yarn": ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")}


@dataclass(frozen=True)
class RopeScaling:
    """The scaling of rotary positions, by transformers' names.

    Args:
        rope_type: "linear" divides all frequencies by `factor` (position interpolation, Chen et al., arXiv 2306.15595);
            "llama3" the low ones, with a ramp between two wavelengths; "yarn" by parts (Peng et al., arXiv 2309.00071).
        factor: how much longer the context is, >= 1.
        original_max_position_embeddings: context of the training, in tokens ("llama3", "yarn").
        low_freq_factor, high_freq_factor: the ends of the ramp of "llama3", as parts of the original context.
        beta_fast, beta_slow: the ends of the ramp of "yarn" in rotations; None: 32 and 1.
        attention_factor: of cos and sin under "yarn"; None: 0.1 ln(factor) + 1, or as mscale and mscale_all_dim say.
        mscale, mscale_all_dim: as in DeepSeek's "yarn".
        truncate: whether "yarn" rounds the ends of its ramp to whole dimensions; None: True.
    Raises:
        TypeError, ValueError: an unknown type, a value that is missing or out of range, or one of another type.
    """

    rope_type: str
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in _REQUIRED:
            raise ValueError(f"rope_scaling: rope_type is {self.rope_type!r}; expected one of {', '.join(_REQUIRED)}")
        given = self.to_dict()
        allowed = ("rope_type", *_REQUIRED[self.rope_type], *_OPTIONAL.get(self.rope_type, ()))
        for name in _REQUIRED[self.rope_type]:
            if name not in given:
                raise ValueError(f"rope_scaling: {name} is missing; {self.rope_type!r} needs it")
        for name in given:
            if name not in allowed:
                raise ValueError(
                    f"rope_scaling: {name} does not go with {self.rope_type!r}; it takes {', '.join(allowed)}"
                )
        self._check_values(given)

    def _check_values(self, given: dict[str, Any]) -> None:
        for name, value in given.items():
            if name == "original_max_position_embeddings":
                check_count("rope_scaling", name, value)
            elif name == "truncate":
                if not isinstance(value, bool):
                    raise TypeError(f"rope_scaling: truncate is {value!r}; expected True or False")
            elif name != "rope_type":
                least = 1.0 if name == "factor" else 0.0
                expected = "a number >= 1" if least else "a number > 0"
                check_real("rope_scaling", name, value, expected, lambda x, least=least: least <= x < 1e9 and x > 0)
        if self.rope_type == "llama3" and not given["low_freq_factor"] < given["high_freq_factor"]:
            raise ValueError(
                f"rope_scaling: low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "expected the first to be smaller"
            )

    @classmethod
    def of(cls, value: Any) -> RopeScaling | None:
        """The scaling that a value says: one of this class, a mapping of its fields, or None.

        Raises:
            TypeError, ValueError: as the class; also an unknown key.
        """
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(
                f"rope_scaling is {value!r}; expected a mapping such as {{'rope_type': 'linear', 'factor': 2.0}}, or None"
            )
        for name in value:
            if name not in cls.__dataclass_fields__:
                raise ValueError(f"rope_scaling: unknown key {name!r}; it has {', '.join(cls.__dataclass_fields__)}")
        if "rope_type" not in value:
            raise ValueError(f"rope_scaling: rope_type is missing; expected one of {', '.join(_REQUIRED)}")
        return cls(**value)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set."""
        return {name: value for name, value in asdict(self).items() if value is not None}
