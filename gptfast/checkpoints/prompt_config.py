"""PromptTuningConfig: the fields of peft's configuration of soft prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gptfast._checks import check_choice, check_count
from gptfast.config import GPTConfig

HEADS = ("score", "classifier", "multiple_choice_head")  # of tasks, as modules_to_save
INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
_REMEDIES = {
    "modules_to_save": "LoraConfig has it",
    "tokenizer_kwargs": "give a tokenizer that needs none",
}


@dataclass
class PromptTuningConfig:
    """A soft prompt: learned vectors before the embeddings of the tokens (Lester et al., arXiv 2104.08691), with the names and
    meanings of peft's fields.

    Args:
        num_virtual_tokens: n, the vectors; they count in the block_size.
        prompt_tuning_init: where they start: "SAMPLE_VOCAB": embeddings of random tokens; "TEXT": those of the tokens of
            prompt_tuning_init_text, repeated or cut to n; "RANDOM": normal with deviation 1, as peft has it, beside 0.02 of the
            embeddings of a new GPT. Random choices come from torch's generator. peft's own default is "RANDOM".
        prompt_tuning_init_text, tokenizer_name_or_path: for "TEXT": the text, and "gpt2" or the folder of a tokenizer.
        token_dim, num_transformer_submodules, num_attention_heads, num_layers: of the model; None: filled in.
        task_type, base_model_name_or_path, inference_mode: kept for the file; as in peft the last freezes no soft prompt.
        revision: of the base, where base_model_name_or_path is a model of the Hugging Face hub.
        tokenizer_kwargs, modules_to_save: refused.
    Raises:
        TypeError, ValueError: a value of the wrong type or out of range, "TEXT" without text or tokenizer, or a field of
            peft's that gptfast does not have.
    """

    num_virtual_tokens: int | None = None
    prompt_tuning_init: str = "SAMPLE_VOCAB"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    inference_mode: bool = False
    revision: str | None = None

    def __post_init__(self) -> None:
        for name, remedy in _REMEDIES.items():
            if getattr(self, name):
                raise ValueError(
                    f"PromptTuningConfig: {name} is {getattr(self, name)!r}, which gptfast does not have; {remedy}"
                )
        self.modules_to_save = None
        check_count("PromptTuningConfig", "num_virtual_tokens", self.num_virtual_tokens)
        self.prompt_tuning_init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        self.task_type = getattr(self.task_type, "value", self.task_type)
        check_choice("PromptTuningConfig", "prompt_tuning_init", self.prompt_tuning_init, INITS)
        if self.num_transformer_submodules not in (None, 1):
            raise ValueError(
                f"PromptTuningConfig: num_transformer_submodules is {self.num_transformer_submodules}; a GPT has 1, so leave "
                "it out"
            )
        for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            value = getattr(self, name)
            if self.prompt_tuning_init == "TEXT" and not value:
                raise ValueError(
                    f'PromptTuningConfig: prompt_tuning_init is "TEXT" and {name} is {value!r}; give both the text and '
                    "the tokenizer that it is encoded with"
                )

    @property
    def n(self) -> int:
        """num_virtual_tokens, which is checked to be an int."""
        assert self.num_virtual_tokens is not None
        return self.num_virtual_tokens


def check_fits(model: GPTConfig, config: PromptTuningConfig) -> None:
    """Raise ValueError for a soft prompt that is for another model, or leaves no room for tokens."""
    n, C, limit = config.n, model.n_embd, model.block_size
    if not model.causal:
        raise ValueError("add_adapter: a soft prompt goes before the tokens of a causal model, not of a BERT; use LoRA")
    if n >= limit:
        raise ValueError(
            f"add_adapter: num_virtual_tokens is {n} and the model's block_size {limit}, which leaves no room for tokens; "
            f"take at most {limit - 1}"
        )
    if config.token_dim not in (None, C):
        raise ValueError(
            f"add_adapter: token_dim is {config.token_dim} and this model's width {C}; a soft prompt is for the base that "
            "it was trained on"
        )
