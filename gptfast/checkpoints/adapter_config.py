"""LoraConfig: the fields of peft's configuration that gptfast honours; and configurations in peft's files."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gptfast._checks import check_choice, check_count, check_real
from gptfast.checkpoints.prompt_config import HEADS, PromptTuningConfig

BIASES = ("none", "all", "lora_only")
INITS = (True, False, "gaussian")
_SWITCHES = ("use_rslora", "fan_in_fan_out", "ensure_weight_tying", "inference_mode")
# Keys of peft's files that say nothing about the model.
_INFORMATION = ("auto_mapping", "peft_version", "runtime_config", "peft_type")
# peft's fields for other methods, and the values at which they do nothing, beside None, False and what is empty.
_NEUTRAL = {"megatron_core": "megatron.core", "qalora_group_size": 16}
_REMEDIES = {
    "use_dora": "train plain LoRA",
    "lora_bias": 'bias="lora_only" trains the biases of the base',
    "trainable_token_indices": 'modules_to_save=["wte"] trains the whole embedding',
    "target_parameters": "name modules in target_modules",
    "layer_replication": "build the model with the layers that it is to have",
}


@dataclass
class LoraConfig:
    """Low-rank updates of linear layers (Hu et al., arXiv 2106.09685), with the names and meanings of peft's fields.

    Args:
        r: rank of the updates.
        lora_alpha: the update is scaled by lora_alpha / r.
        target_modules: names or endings of names ("c_attn", "mlp.c_proj", "transformer.h.0.attn.c_attn"), a regular
            expression for whole names, or "all-linear" for all but the head; None: ["c_attn"], as peft has it for GPT-2.
        exclude_modules: likewise, of modules that stay as they are.
        lora_dropout: probability of dropping an element of the layer's input before A, in training.
        bias: "none", "all" or "lora_only": which biases of the base are trained, and saved with the adapter.
        use_rslora: the scale is lora_alpha / sqrt(r) (Kalajdzievski, arXiv 2312.03732).
        modules_to_save: modules of which the adapter has a trained copy of its own, such as ["wte"], ["lm_head"].
        init_lora_weights: True: A as in torch's Linear and B = 0; "gaussian": A normal of 1 / r; False: B random too.
        layers_to_transform: the layers that `target_modules` is about; None: all.
        layers_pattern: name of the list of layers, "h".
        rank_pattern, alpha_pattern: other r and lora_alpha for names or endings, as regular expressions.
        fan_in_fan_out: how the base stores its matrices; here it changes nothing, and what is written fits transformers.
        ensure_weight_tying: a copy of the token embedding by `modules_to_save` is the head's too, where the base ties them.
        task_type, base_model_name_or_path: kept for the file.
        inference_mode: `add_adapter` leaves the adapter frozen, until `set_adapter`. Files say True, as peft's, whatever it is.
        revision: of the base, where base_model_name_or_path is a model of the Hugging Face hub.
        use_dora, lora_bias, trainable_token_indices, target_parameters, layer_replication: refused.
    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, or a field of peft's that gptfast does not have.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    trainable_token_indices: Any = None
    target_parameters: Any = None
    layer_replication: Any = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in _REMEDIES:
            if getattr(self, name):
                raise ValueError(
                    f"LoraConfig: {name} is {getattr(self, name)!r}, which gptfast does not have; {_REMEDIES[name]}"
                )
        check_count("LoraConfig", "r", self.r)
        positive = "a number > 0"
        check_real("LoraConfig", "lora_alpha", self.lora_alpha, positive, lambda x: 0 < x < math.inf)
        check_real("LoraConfig", "lora_dropout", self.lora_dropout, "a probability in [0, 1)", lambda p: 0 <= p < 1)
        check_choice("LoraConfig", "bias", self.bias, BIASES)
        check_choice("LoraConfig", "init_lora_weights", self.init_lora_weights, INITS)
        self.target_modules = (
            ["c_attn"] if self.target_modules is None else _names("target_modules", self.target_modules)
        )
        self.exclude_modules = _names("exclude_modules", self.exclude_modules)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"LoraConfig: modules_to_save is {self.modules_to_save!r}; expected a list of names")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"LoraConfig: {name} is {getattr(self, name)!r}; expected True or False")
        named = _names("modules_to_save", self.modules_to_save)
        self.modules_to_save = named if isinstance(named, list) else None
        layers = self.layers_to_transform
        for layer in layers if isinstance(layers, (list, tuple)) else () if layers is None else (layers,):
            check_count("LoraConfig", "layers_to_transform", layer, 0)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern)
        self._check_layers()
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(getattr(self, name), Mapping):
                raise TypeError(
                    f"LoraConfig: {name} is {getattr(self, name)!r}; expected a mapping of names to numbers"
                )
        for pattern, rank in self.rank_pattern.items():
            check_count("LoraConfig", f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern.items():
            check_real("LoraConfig", f"alpha_pattern[{pattern!r}]", alpha, positive, lambda x: 0 < x < math.inf)
        self._check_expressions()
        self.task_type = _plain(self.task_type)

    def _check_expressions(self) -> None:
        patterns = self.layers_pattern or []
        given: dict[str, Sequence[Any]] = {
            "layers_pattern": [patterns] if isinstance(patterns, str) else patterns,
            "rank_pattern": list(self.rank_pattern),
            "alpha_pattern": list(self.alpha_pattern),
        }
        for name in ("target_modules", "exclude_modules"):  # lists hold names
            given[name] = [value] if isinstance(value := getattr(self, name), str) else []
        for name, expressions in given.items():
            for expression in expressions:
                try:
                    re.compile(expression)
                except (re.error, TypeError) as error:
                    raise ValueError(
                        f"LoraConfig: {name} has {expression!r}, no regular expression ({error})"
                    ) from error

    def _check_layers(self) -> None:
        """As peft: layers are for lists of names, as a regular expression says them itself."""
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and getattr(self, name) not in (None, [], ""):
                raise ValueError(
                    f"LoraConfig: {name} has no effect beside target_modules={self.target_modules!r}; list names in "
                    "target_modules, or write the layers into a regular expression"
                )
        if self.layers_pattern and self.layers_to_transform in (None, []):
            raise ValueError(
                f"LoraConfig: layers_pattern is {self.layers_pattern!r} without layers_to_transform; give both or none"
            )

    def unmatched(self, names: Sequence[str]) -> dict[str, list[str]]:
        """The patterns of rank_pattern and alpha_pattern that fit none of these modules."""
        called = [own for name in names for own in _names_of(name)]
        fields = {"rank_pattern": self.rank_pattern, "alpha_pattern": self.alpha_pattern}
        left = {key: [p for p in given if not by_pattern({p: True}, called, False)] for key, given in fields.items()}
        return {key: patterns for key, patterns in left.items() if patterns}

    def rank_of(self, name: str) -> int:
        """r of a module."""
        return by_pattern(self.rank_pattern, _names_of(name), self.r)

    def alpha_of(self, name: str) -> float:
        """lora_alpha of a module."""
        return by_pattern(self.alpha_pattern, _names_of(name), self.lora_alpha)

    def scale_of(self, name: str) -> float:
        """Factor of a module's update."""
        r, alpha = self.rank_of(name), self.alpha_of(name)
        return alpha / (math.sqrt(r) if self.use_rslora else r)


AdapterConfig = LoraConfig | PromptTuningConfig
_KINDS: dict[str, type[AdapterConfig]] = {"LORA": LoraConfig, "PROMPT_TUNING": PromptTuningConfig}


def from_peft(raw: Mapping[str, Any], where: object) -> AdapterConfig:
    """The configuration in the content of an adapter_config.json.

    Raises:
        ValueError: another method, a field that gptfast does not have set to something, or a value out of range.
    """
    kind = _plain(raw.get("peft_type"))
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"{where}: peft_type is {kind!r}; gptfast has {' and '.join(_KINDS)} - use peft for others")
    known = {f.name for f in dataclasses.fields(_KINDS[kind])}
    for key, value in raw.items():
        if key not in known and key not in _INFORMATION and value and value != _NEUTRAL.get(key):
            raise ValueError(f"{where}: {key} is {json.dumps(value)[:60]}, which gptfast does not have; use peft")
    given = {key: value for key, value in raw.items() if key in known and value is not None}
    if kind == "PROMPT_TUNING":  # a head is no part of the GPT; `load` returns it
        given["modules_to_save"] = [m for m in given.get("modules_to_save") or [] if m not in HEADS]
    try:
        return _KINDS[kind](**given)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def to_peft(config: AdapterConfig, **changed: Any) -> dict[str, Any]:
    """The content of adapter_config.json."""
    kind = next(kind for kind, own in _KINDS.items() if isinstance(config, own))
    return {"peft_type": kind, **dataclasses.asdict(config), **changed, "inference_mode": True}


def of_user(config: Any) -> AdapterConfig:
    """A configuration of our own, from ours or from peft's.

    Raises:
        TypeError: something else.  ValueError: see `from_peft`.
    """
    if isinstance(config, AdapterConfig):
        return dataclasses.replace(config)
    if type(config).__module__.partition(".")[0] == "peft" and hasattr(config, "to_dict"):
        return from_peft(config.to_dict(), f"add_adapter: peft's {type(config).__name__}")
    raise TypeError(
        f"add_adapter: config is a {type(config).__name__}; expected a LoraConfig or PromptTuningConfig of "
        "gptfast.finetuning"
    )


def _names(name: str, value: Any) -> list[str] | str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, (list, tuple, set)) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"LoraConfig: {name} is {value!r}; expected a list of names or a regular expression")
    return sorted(value) if isinstance(value, set) else list(value)


def _plain(value: Any) -> Any:
    """The text of an enum's member, as peft has them."""
    return getattr(value, "value", value)


def by_pattern(patterns: Mapping[str, Any], names: Sequence[str], default: Any) -> Any:
    """The value of the first pattern that fits one of a module's names, as peft has it."""
    fits = (v for pattern, v in patterns.items() if any(re.match(rf"(.*\.)?({pattern})$", name) for name in names))
    return next(fits, default)


def _names_of(name: str) -> tuple[str, str]:
    """The names of a module by which patterns that begin with ^ may call it."""
    return name, f"transformer.{name}"
