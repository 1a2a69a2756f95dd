"""POST /tokenize, POST /detokenize and GET /tokenizer_info, as vLLM has them: text to token ids and back, for clients without
the tokenizer, such as lm-evaluation-harness."""

from __future__ import annotations

from typing import Any

from gptfast.serving.names import Names
from gptfast.serving.protocol import ApiError, Body, read_body
from gptfast.tokenizer import Tokenizer, encode_prompt


class Tokenize(Body):
    """add_special_tokens is accepted and changes nothing: our prompts get no tokens but their own."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class Detokenize(Body):
    model: str | None = None
    tokens: list[int]


class Tokens:
    """Answers requests about the tokenizer.

    Args:
        names: of the models, for requests that name one.
        special: encode special tokens in prompts as such, as the completions do.
        template: the chat template; None: there is none.
    """

    def __init__(
        self, tokenizer: Tokenizer, names: Names, block_size: int, special: bool, template: str | None
    ) -> None:
        self._tokenizer, self._names, self._block_size = tokenizer, names, block_size
        self._special, self._template = special, template

    def info(self) -> dict[str, Any]:
        eos = self._tokenizer.eos_id
        text = None if eos is None else self._tokenizer.decode([eos])
        return {
            "tokenizer_class": type(getattr(self._tokenizer, "inner", self._tokenizer)).__name__,
            "vocab_size": self._tokenizer.vocab_size,
            "bos_token": text,
            "eos_token": text,
            "pad_token": text,
            "chat_template": self._template,
        }

    def tokenize(self, body: bytes) -> dict[str, Any]:
        ask = read_body(Tokenize, body)
        self._check_model(ask.model)
        try:
            ids = encode_prompt(self._tokenizer, ask.prompt, self._special)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), "prompt") from None
        return {"tokens": ids, "count": len(ids), "max_model_len": self._block_size}

    def detokenize(self, body: bytes) -> dict[str, Any]:
        ask = read_body(Detokenize, body)
        self._check_model(ask.model)
        known = [0 <= token < self._tokenizer.vocab_size and self._tokenizer.has_token(token) for token in ask.tokens]
        if not all(known):
            token = ask.tokens[known.index(False)]
            raise ApiError(400, f"tokens: {token} has no token; ids run to {self._tokenizer.vocab_size - 1}", "tokens")
        return {"prompt": self._tokenizer.decode(ask.tokens)}

    def _check_model(self, name: str | None) -> None:
        """Raise ApiError for the name of a model that this server does not have."""
        if name is not None:
            self._names.adapter_of(name)
