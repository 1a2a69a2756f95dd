"""`generate` of patched language models of transformers: on gptfast's runner where it gives the same text."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.models.openai import modeling_openai as openai
from transformers.utils import logging

from gptfast.checkpoints import hf_layout
from gptfast.config import GPTConfig
from gptfast.integrations.joined import calls_hooks
from gptfast.integrations.swap import original_class
from gptfast.models import GPT

_logger = logging.get_logger(__name__)
# Options of transformers' GenerationConfig that have the same meaning here.
SAME = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_return_sequences",
    "num_beams",
    "length_penalty",
    "early_stopping",
)
# Options without meaning for the text: ids that name tokens, lengths that are looked at below, how transformers caches.
ASIDE = {"max_length", "max_new_tokens", "eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"}
ASIDE |= {"use_cache", "transformers_version", "suppress_tokens", "_from_model_config", "output_attentions"}
ASIDE |= {"output_hidden_states", "max_cache_len"}
NEVER = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model")
NEVER += ("negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate", "trust_remote_code")

_twins: WeakKeyDictionary[nn.Module, tuple[Any, GPT]] = WeakKeyDictionary()


def generate(model: Any, plain: Any, inputs: Any = None, generation_config: Any = None, **options: Any) -> Any:
    """transformers' `generate`, by gptfast where all that is asked for means the same there, else by transformers itself.

    Greedy and beam search give the same tokens. Draws follow torch's generator, which `transformers.set_seed` sets, but are
    others than transformers'.

    Args:
        model: a patched language model.
        plain: `generate` of its class.
        inputs, generation_config, options: of transformers' `generate`.
    """
    try:
        ids, ours = _ours(model, inputs, generation_config, dict(options))
        twin = _twin(model)
    except NotImplementedError as error:
        _logger.warning_once(f"gptfast: this call of generate runs in transformers' own loop: {error}")
        return plain(model, inputs, generation_config, **options)
    return twin.generate(ids, **ours)


def _ours(model: Any, inputs: Any, config: Any, options: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Prompts, and options of `GPT.generate`.

    Raises:
        NotImplementedError: something is asked for that gptfast does not do, or does in another way.
    """
    for name in NEVER:
        if options.pop(name, None):
            raise NotImplementedError(f"{name} is given")
    streamer = options.pop("streamer", None)
    length_is_default = all(
        value is None
        for value in (
            options.get("max_length"),
            getattr(config, "max_length", None),
            model.generation_config.max_length,
        )
    )
    config, others = model._prepare_generation_config(config, **options)
    ids, mask = _prompts(inputs, others)
    _check_config(config)
    limit = model.config.n_positions
    if config.max_new_tokens is not None:
        new = config.max_new_tokens
    else:
        new = min(config.max_length, limit - ids.shape[1]) if length_is_default else config.max_length - ids.shape[1]
    if new < 1 or ids.shape[1] + new > limit:
        raise NotImplementedError(f"{new} new tokens after {ids.shape[1]}, in {limit} positions")
    ours = {name: value for name in SAME if (value := getattr(config, name, None)) is not None}
    if not ours.get("do_sample"):
        for name in ("temperature", "top_k", "top_p", "min_p"):
            ours.pop(name, None)
    elif config.num_beams > 1:
        raise NotImplementedError("beams that are drawn")
    elif "top_p" in ours:  # transformers takes 0, which leaves one token, and draws among all from 1 on
        if ours["top_p"] == 0:
            raise NotImplementedError("top_p=0")
        ours["top_p"] = min(ours["top_p"], 1.0)
    V = model.get_input_embeddings().weight.shape[0]
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < V:
        raise NotImplementedError(f"pad_token_id={config.pad_token_id} of {V} tokens")
    ends = [end for end in ends if 0 <= end < V]  # what is not in the vocabulary never comes
    ours |= {"max_new_tokens": new, "eos_token_id": tuple(ends) or None, "draft_repeats": True}
    # transformers' beam search fills up with the first end token where the padding token is 0
    pad = None if config.pad_token_id == 0 and config.num_beams > 1 and ends else config.pad_token_id
    ours |= {"pad_token_id": pad, "suppress_tokens": config.suppress_tokens}
    if streamer is not None:
        ours["streamer"] = streamer
    if mask is not None and not bool(mask.all()):
        ours["attention_mask"] = mask
    return ids, ours


def _prompts(inputs: Any, others: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    ids = others.pop("input_ids", None) if inputs is None else inputs
    mask = others.pop("attention_mask", None)
    others.pop("use_cache", None)
    given = [name for name, value in others.items() if value is not None]
    if given:
        raise NotImplementedError(f"{', '.join(given)} is given")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] == 0:
        raise NotImplementedError("the prompts are no (B, T) tensor of ids")
    if mask is not None:
        shown = mask.bool() if isinstance(mask, Tensor) and mask.shape == ids.shape else None
        if shown is None or bool((shown[:, :-1] & ~shown[:, 1:]).any()) or not bool(shown[:, -1].all()):
            raise NotImplementedError("the attention mask is another than padding on the left")
    return ids, mask


def _check_config(config: Any) -> None:
    """Raise NotImplementedError where an option has another value than transformers' default, and no place in `SAME`."""
    default = GenerationConfig()
    default.update(**default._get_default_generation_params(), defaults_only=True)
    for name, value in config.to_dict().items():
        if name not in ASIDE and name not in SAME and value != getattr(default, name, None) and value is not None:
            raise NotImplementedError(f"{name}={value!r}")


def _twin(model: Any) -> GPT:
    """A `gptfast.GPT` whose parameters are views of the model's, made once and again when these are other tensors.

    Raises:
        NotImplementedError: the model's modules compute something else than its config says.
    """
    check_plain(model)
    weights = dict(model.named_parameters(remove_duplicate=False))
    raw = {**model.config.to_dict(), "vocab_size": _of(model, "wte", "tokens_embed").weight.shape[0]}
    raw["n_positions"] = _of(model, "wpe", "positions_embed").weight.shape[0]
    raw["tie_word_embeddings"] = model.lm_head.weight is _of(model, "wte", "tokens_embed").weight
    key = raw, [(name, x.data_ptr(), x.dtype, tuple(x.shape), x.device) for name, x in weights.items()]
    known = _twins.get(model)
    if known is not None and known[0] == key:
        return known[1]
    try:
        config = GPTConfig(**hf_layout.from_hf(raw, "model.config"))
    except (TypeError, ValueError) as error:
        raise NotImplementedError(str(error)) from None
    with torch.device("meta"):
        twin = GPT(config)
    views, wanted = {}, dict(twin.named_parameters(remove_duplicate=False))
    for name, x in weights.items():
        ours = hf_layout.from_file(name)
        if ours in wanted:
            views[ours] = x.detach().t() if hf_layout.is_conv1d(ours) else x.detach()
    twin.load_state_dict(views, assign=True)
    twin.tie_weights()
    twin.requires_grad_(False).eval()
    _twins[model] = key, twin
    return twin


def _of(model: Any, *names: str) -> Any:
    return next(getattr(model.transformer, name) for name in names if hasattr(model.transformer, name))


PLAIN = {"Embedding", "ModuleList", "GPT2Model", "GPT2Block", "GPT2MLP", "OpenAIGPTModel", "Block", "NewGELUActivation"}


def check_plain(model: Any) -> None:
    """Raise NotImplementedError where a patched model is more than its config and its weights: adapters, hooks, a mode."""
    config = model.config
    replaced = [name for name, value in vars(model).items() if callable(value) and hasattr(type(model), name)]
    if replaced:  # as peft does with prepare_inputs_for_generation, which puts its prompts before the ids
        raise NotImplementedError(f"{replaced[0]} was replaced on the instance")
    wanted = config.afn if config.model_type == "openai-gpt" else config.activation_function
    for name, module in model.named_modules():
        told = f"{name or 'the model'} is a {type(module).__name__}"
        if module.training:
            raise NotImplementedError("the model is in training mode; call model.eval()")
        own = type(module).__module__.startswith(("transformers.", "torch.")) and type(module).__name__ in PLAIN
        original = original_class(module)
        if original is None and not own and not name.endswith(".act"):
            raise NotImplementedError(told)
        if calls_hooks(module) or module._forward_pre_hooks or "forward" in vars(module):
            raise NotImplementedError(f"{name or 'the model'} has hooks")
        if isinstance(module, nn.LayerNorm) and module.eps != config.layer_norm_epsilon:
            raise NotImplementedError(f"{name}.eps is {module.eps}")
        if name.endswith(".act") and not _is_activation(module, wanted, config.model_type):
            raise NotImplementedError(told)
        scaling: Any = getattr(module, "scaling", None)
        if scaling is not None and scaling != vars(module)["head_dim"] ** -0.5:
            raise NotImplementedError(f"{name}.scaling is {scaling}")


def _is_activation(module: nn.Module, wanted: str, kind: str) -> bool:
    if kind == "openai-gpt":
        return module is openai.ACT_FNS[wanted]
    return (original_class(module) or type(module)) is type(ACT2FN[wanted])
