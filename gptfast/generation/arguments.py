"""Arguments of `generate` and `stream` as users of transformers and nanoGPT write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptfast.nn.inputs import refuse

UNUSED = ("use_cache",)  # ignored: it does not change the text
_LOGPROBS = "return_logprobs=True returns the log-probabilities of the new tokens, and the scores of beams"
_CHANGE = "logit_bias, suppress_tokens, the penalties and no_repeat_ngram_size change scores; for others choose tokens yourself"
_CACHE = "a call keeps keys and values by itself; gptfast.generation.Scheduler runs many requests"
REFUSED = {
    "token_type_ids": "a GPT knows one type of token; leave it out",
    "position_ids": "positions follow from attention_mask; leave it out",
    "inputs_embeds": "give the tokens behind the vectors as ids, and the vectors as prefix_embeds",
    "labels": "it is for the loss, see GPT.forward; leave it out",
    "past_key_values": _CACHE,
    "cache_implementation": _CACHE,
    "generation_config": "give its settings as options by themselves",
    "return_dict_in_generate": _LOGPROBS,
    "output_scores": _LOGPROBS,
    "output_logits": _LOGPROBS,
    "output_attentions": "attention weights are never stored",
    "output_hidden_states": "call the model on the text, with a forward hook on model.h[n]",
    "logits_processor": _CHANGE,
    "sequence_bias": _CHANGE,
    "bad_words_ids": "suppress_tokens=[…] bans single tokens",
    "begin_suppress_tokens": _CHANGE,
    "stopping_criteria": "stop_strings and eos_token_id end a text; gptfast.generation.stream can be left at any step",
    "max_time": "gptfast.generation.stream can be left at any step",
    "min_length": "logit_bias={end token: -inf} keeps a text from ending",
    "min_new_tokens": "logit_bias={end token: -inf} keeps a text from ending",
    "forced_bos_token_id": "begin the prompt with it",
    "forced_eos_token_id": "append it yourself",
    "bos_token_id": "begin the prompt with it",
    "typical_p": "top_p and min_p cut the unlikely tokens",
    "epsilon_cutoff": "top_p and min_p cut the unlikely tokens",
    "eta_cutoff": "top_p and min_p cut the unlikely tokens",
    "penalty_alpha": "contrastive search is not here; repetition_penalty avoids repetition",
    "force_words_ids": "constrained beams are not here",
    "constraints": "constrained beams are not here",
    "max_tokens": "here it is called max_new_tokens",
    "stop": "here it is called stop_strings",
    "n": "here it is called num_return_sequences",
}


def unpack(ids: Any, given: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Split the arguments of a call into (prompts, attention_mask or None, other options).

    Args:
        ids: the prompts, a mapping with "input_ids" such as a BatchEncoding, or None where they are in `given`.
        given: all keyword arguments of the call.
    Raises:
        TypeError: prompts given twice, or an argument of transformers that is not supported; the message says what to use.
    """
    options = {name: value for name, value in given.items() if name not in UNUSED}
    for name in ("input_ids", "inputs"):
        other = options.pop(name, None)
        if other is not None and ids is not None:
            raise TypeError(f"generate: ids and {name} were both given; the prompts go into one of them")
        ids = other if ids is None else ids
    if isinstance(ids, Mapping):
        batch = dict(ids)
        if batch.get("input_ids") is None:
            raise TypeError(f"generate: ids is a {type(ids).__name__} without input_ids; expected those of a tokenizer")
        if "attention_mask" in batch and options.get("attention_mask") is not None:
            raise TypeError("generate: attention_mask was given twice, beside the batch and in it; leave one out")
        ids = batch.pop("input_ids")
        options |= batch
    mask = options.pop("attention_mask", None)
    foreign = {name: value for name, value in options.items() if name in REFUSED}
    refuse("generate", foreign, REFUSED)
    return ids, mask, {name: value for name, value in options.items() if name not in foreign}
