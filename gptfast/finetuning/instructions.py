"""Instruction and chat examples as rows of ids: the loss on responses, rows packed without attention across examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptfast.finetuning.examples import encoded
from gptfast.finetuning.special_tokens import add_tokens
from gptfast.models import GPT
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.base import encode_part
from gptfast.tokenizer.chat import (
    CHATML,
    CHATML_TOKENS,
    ChatTemplate,
    content_text,
    encode_with_spans,
    with_chat_template,
)

ROLES = ("system", "user", "assistant", "tool", "developer")
IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """Arguments of `GPT.forward` for several examples one after another; T tokens in all.

    ids: (1, T). targets: (1, T), the token that follows where it belongs to a response of the same example, else -100.
    cu_seqlens: (n + 1,), int32, the ends of the examples: none sees another.
    """

    ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor


def set_up_chat(
    model: GPT,
    tokenizer: Tokenizer,
    template: str = CHATML,
    *,
    end_token: str = CHATML_TOKENS[1],
    special_tokens: Sequence[str] = CHATML_TOKENS,
) -> Tokenizer:
    """Give a model a chat template, whose special tokens get ids and rows, and its end token.

    The end token ends texts beside those that did: `generate`, packed models, `gptfast generate` and the server stop there,
    and `save_pretrained` writes it to generation_config.json. `tokenizer.save` writes the template.

    Args:
        model: changed in place.
        tokenizer: a BPE.
        template: Jinja2, see `ChatTemplate`.
        end_token: ends a reply.
        special_tokens: further tokens of the template.
    Returns:
        The tokenizer with template and tokens.
    Raises:
        TypeError, ValueError: see `ChatTemplate`, `with_chat_template` and `add_tokens`.
    """
    changed = with_chat_template(tokenizer, template)
    extended, ids = add_tokens(model, changed, list(dict.fromkeys((*special_tokens, end_token))))
    ends = model.metadata.end_tokens(model.config.vocab_size, [tokenizer.eos_id])
    named = list(dict.fromkeys((ids[end_token], *ends)))
    model.metadata.generation = {**(model.metadata.generation or {}), "eos_token_id": named}
    return extended or changed


def response_mask(
    example: Mapping[str, Any], tokenizer: Tokenizer, template: ChatTemplate | None = None, where: str = ""
) -> tuple[list[int], list[int]]:
    """The ids of an example, and 1 for each token that the model learns, that is, of a response; 0 else.

    With a chat template prompt and response are the messages of user and assistant. Without one they follow each other,
    and the tokenizer's end token, which is learnt, follows the response.

    Args:
        example: {"prompt", "response"}, or {"messages": [{"role", "content"}, …]}; a content is a text, or a list of parts
            {"type": "text", "text"}: see `ChatTemplate.readable`.
        tokenizer: with the chat template, if template is None.
        template: None: the tokenizer's own.
        where: file and line of the example, for messages.
    Raises:
        TypeError, ValueError: fields that are missing or of another kind, no response, messages without a template, or a
            template that does not fit.
    """
    where = where or "response_mask"
    check_conversation(example, where)
    template = template or ChatTemplate.of(tokenizer)
    if template is None and "messages" in example:
        raise ValueError(
            f"{where}: messages need a chat template, and the tokenizer has none; make one with "
            "gptfast.finetuning.set_up_chat, or give prompt and response"
        )
    if template is None:
        prompt = encoded(tokenizer.encode, example["prompt"], where)
        response = encoded(partial(encode_part, tokenizer), example["response"], where)
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        return [*prompt, *response, *end], [0] * len(prompt) + [1] * len(response + end)
    try:
        text, spans = template.render_with_replies(template.readable(messages_of(example)))
        return encode_with_spans(tokenizer, text, spans)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def messages_of(example: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation of an example; a prompt and its response are one of two messages."""
    if "messages" in example:
        return list(example["messages"])
    roles = (("user", "prompt"), ("assistant", "response"))
    return [{"role": role, "content": example[name]} for role, name in roles]


def check_conversation(example: Mapping[str, Any], where: str) -> None:
    """Raise ValueError unless an example has the fields of a conversation with a response."""
    if "messages" not in example:
        for name in ("prompt", "response"):
            if not isinstance(example.get(name), str):
                got = f"{name} is {example[name]!r}" if name in example else f"there is no field {name!r}"
                raise ValueError(f"{where}: {got}; expected texts prompt and response, or a list of messages")
        return
    messages = example["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: messages is {messages!r}; expected a list of objects with role and content")
    for n, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: messages[{n}] is {message!r}; expected an object with role and content")
        if message["role"] not in ROLES:
            raise ValueError(f"{where}: messages[{n}].role is {message['role']!r}; expected one of {', '.join(ROLES)}")
        if message.get("content") is not None or not message.get("tool_calls"):
            content_text(f"{where}: messages[{n}]", message.get("content"))
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError(f"{where}: messages has no message of the role assistant; there is nothing to learn")


class Conversations:
    """Examples as rows of ids with their masks.

    A row longer than `limit` is cut at its end; one that then has no response is left out.

    rows: (ids, mask) of each example that is kept. truncated: examples that were cut, those left out included. left_out:
    examples without a response within `limit` tokens.

    Args:
        examples: as `response_mask`.
        tokenizer: of the model.
        limit: the longest row, the model's block_size.
        where: file and line of each example.
    Raises:
        TypeError, ValueError: as `response_mask`; or no example is left.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        tokenizer: Tokenizer,
        limit: int,
        where: Sequence[str] | None = None,
    ) -> None:
        self.rows: list[tuple[list[int], list[int]]] = []
        self.truncated = self.left_out = 0
        template = ChatTemplate.of(tokenizer)
        for example, place in zip(examples, where or [""] * len(examples), strict=True):
            ids, mask = response_mask(example, tokenizer, template, place)
            self.truncated += len(ids) > limit
            if any(mask[1:limit]):
                self.rows.append((ids[:limit], mask[:limit]))
            else:
                self.left_out += 1
        if not self.rows:
            place = f"{where[0]} and on" if where else "Conversations"
            raise ValueError(
                f"{place}: none of {len(examples)} examples has a response within {limit} tokens; give others, or a model "
                "with a larger block_size"
            )

    def packed(self, tokens: int, order: Iterable[int] | None = None) -> list[Packed]:
        """The rows, several in a batch.

        Args:
            tokens: upper bound of a batch; a longer row is a batch by itself.
            order: numbers of rows; None: as they are.
        """
        batches: list[list[tuple[list[int], list[int]]]] = []
        room = 0
        for n in range(len(self.rows)) if order is None else order:
            row = self.rows[n]
            if len(row[0]) > room or not batches:
                batches.append([])
                room = tokens
            batches[-1].append(row)
            room -= len(row[0])
        return [pack(batch) for batch in batches]


def pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Packed:
    """One batch of (ids, mask) rows; see `Packed`."""
    ids = [i for row, _ in rows for i in row]
    targets: list[int] = []
    for row, mask in rows:
        targets += [i if learnt else IGNORED for i, learnt in zip(row[1:], mask[1:], strict=True)] + [IGNORED]
    ends = torch.tensor([0, *(len(row) for row, _ in rows)], device="cpu").cumsum(0)
    long = {"dtype": torch.int64, "device": "cpu"}
    return Packed(torch.tensor([ids], **long), torch.tensor([targets], **long), ends.to(torch.int32))
