"""Conversations as prompts of a reply: by the tokenizer's chat template, or as a plain transcript where it has none."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from gptfast.tokenizer.base import Tokenizer, encode_prompt
from gptfast.tokenizer.chat import ChatTemplate, content_text, encode_chat

ROLES = ("system", "developer", "user", "assistant")
TRANSCRIPT = {"system": "System", "developer": "System", "user": "User", "assistant": "Assistant"}
TRANSCRIPT_STOPS = tuple(f"{gap}{name}:" for name in ("User", "System", "Assistant") for gap in ("\n\n", "\n"))
REASONING = "reasoning_effort"  # OpenAI's name, and that of the variable in gpt-oss' template
EFFORTS = ("low", "medium", "high")
_KEYS = ("role", "content", "name")
_FIXED = ("messages", "add_generation_prompt", "tools", "documents", "self")  # variables that are not the client's
_OPEN, _CLOSE = "\ue000", "\ue001"  # private characters around special tokens that a message contains
_PROBE = ("\ue002", "\ue003")  # a reply and the message behind it, for which `_turn_ends` looks

_CONTINUED = (
    "\ue004 "  # stands behind a message that is to be continued; the blank tells whether a template trims messages
)
_HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
_CALL = "<|call|>"  # ends a reply of gpt-oss that calls a tool

Messages = Sequence[Mapping[str, Any]]
NONE: Mapping[str, Any] = MappingProxyType({})


class Channels:
    """Which tokens of a reply are what the user is told, in gpt-oss' format (Harmony): a reply is several messages, each with
    a header that names its channel, such as "analysis" for thoughts. The reply is the text of "final", or of a message without
    a channel. One object follows one reply, whose prompt ends inside the first header.

    Args:
        tokenizer: of the model.
        start, channel, message, end: ids of the tokens around the parts of a message.
    """

    def __init__(self, tokenizer: Tokenizer, start: int, channel: int, message: int, end: int) -> None:
        self._tokenizer, self._ids = tokenizer, (start, channel, message, end)
        self._header: list[int] | None = None  # ids of the channel's name; None: no channel was named
        self._inside, self._shown = False, False

    def keeps(self, token: int) -> bool:
        """Whether the next token of the reply is a part of its text."""
        start, channel, message, end = self._ids
        if token in (start, end):
            self._header, self._inside = None, False
        elif token == channel and not self._inside:
            self._header = []
        elif token == message and not self._inside:
            name = None if self._header is None else self._tokenizer.decode(self._header).split()[:1]
            self._inside, self._shown = True, name in (None, [], ["final"])
        elif self._inside:
            return self._shown
        elif self._header is not None:
            self._header.append(token)
        return False


@dataclass(frozen=True)
class ChatFormat:
    """How the conversations of a model are written.

    Without a template: `System: …`, `User: …` and `Assistant: …` with an empty line between the messages, and "Assistant:" at
    the end. A line that begins a message ends the reply.

    Args:
        tokenizer: of the model.
        template: None: a plain transcript.
        end_ids: special tokens that end a reply, beside those of the model.
        stops: texts that end a reply and are not a part of it.
        harmony: ids of the tokens that divide a reply into channels (`Channels`); (): replies are plain.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    end_ids: tuple[int, ...] = ()
    stops: tuple[str, ...] = TRANSCRIPT_STOPS
    harmony: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatFormat:
        """The format of a tokenizer.

        Raises:
            ImportError: jinja2 is not installed.  ValueError: the template is no Jinja2.  TypeError: a template beside a
                tokenizer that finds no special tokens in a text.
        """
        template = ChatTemplate.of(tokenizer)
        if template is None:
            return cls(tokenizer, None)
        specials = _specials(tokenizer)
        harmony = _HARMONY if _HARMONY[1] in template.source and {*_HARMONY} <= {*specials} else ()
        dividers = tuple(encode_chat(tokenizer, token)[0] for token in harmony)
        last, between = _turn_ends(template)
        for end in (last, between):  # gpt-oss ends its last reply otherwise than those before
            token = next((t for t in sorted(specials, key=len, reverse=True) if end.lstrip().startswith(t)), None)
            if token is not None:
                ends = (token, _CALL) if harmony and _CALL in specials and _CALL in template.source else (token,)
                return cls(tokenizer, template, tuple(encode_chat(tokenizer, "".join(ends))), (), dividers)
        return cls(tokenizer, template, (), (between.rstrip(),) if between.strip() else (), dividers)

    def channels(self) -> Channels | None:
        """What tells the text of a new reply from its thoughts; None: replies are plain."""
        return Channels(self.tokenizer, *self.harmony) if self.harmony else None

    @property
    def name(self) -> str:
        return "transcript" if self.template is None else "template"

    def checked_variables(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the template that a client sets, such as reasoning_effort="low" (None: not set); for `text`, `prompt` and
        `fitted`.

        Raises:
            ValueError: one that the template does not read or that is not the client's, or a reasoning_effort other than
                EFFORTS.
        """
        found = {name: value for name, value in given.items() if name != REASONING or value is not None}
        for name in found:
            if self.template is None:
                why = "the tokenizer of this model has no chat template, so nothing reads it"
            elif name in _FIXED or name in self.template.variables:
                why = "the conversation and the tokenizer decide it"
            elif name not in self.template.names:
                why = "the chat template of this model does not read it"
            else:
                continue
            raise ValueError(f"`{name:.60}`: {why}; leave it out")
        check_effort(found.get(REASONING))
        return found

    def text(self, messages: Messages, variables: Mapping[str, Any] = NONE) -> str:
        """The prompt of the reply to messages.

        Args:
            variables: for the template, see `checked_variables`.
        Raises:
            ValueError: messages that `checked` refuses, or that the template refuses.
        """
        plain = self._for_template(checked(messages))
        if self.template is not None:
            return self.template.render(plain, add_generation_prompt=True, **variables)
        written = (f"{TRANSCRIPT[message['role']]}: {message['content'].strip()}\n\n" for message in plain)
        return "".join(written) + "Assistant:"

    def prompt(self, messages: Messages, special: bool = True, variables: Mapping[str, Any] = NONE) -> list[int]:
        """The ids of `text`.

        Args:
            special: special tokens inside messages and variables are these tokens, as in transformers' `apply_chat_template`.
                False: they are ordinary text, so that a message cannot end itself; those of the template stay tokens.
            variables: as of `text`.
        Raises:
            ValueError: as `text`; or a character that the tokenizer lacks.
        """
        if self.template is None:
            return encode_prompt(self.tokenizer, self.text(messages), special)
        if special:
            return encode_chat(self.tokenizer, self.text(messages, variables))
        names = sorted(_specials(self.tokenizer), key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        marked = self.text(_marked(checked(messages), pattern), _marked(dict(variables), pattern))
        ids: list[int] = []
        for n, piece in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", marked)):
            ids += encode_chat(self.tokenizer, piece, special=n % 2 == 0) if piece else []
        return ids

    def fitted(
        self, messages: Messages, room: int, special: bool = True, variables: Mapping[str, Any] = NONE
    ) -> tuple[list[Mapping[str, Any]], list[int]]:
        """The messages whose prompt fits into `room` tokens, and its ids: the oldest are left out first, system messages never,
        and the last message never. A reply is left out with the message that it answers.

        Raises:
            ValueError: as `prompt`; or nothing more can be left out.
        """
        kept = list(messages)
        while len(ids := self.prompt(kept, special, variables)) > room:
            old = [n for n, message in enumerate(kept[:-1]) if message["role"] not in ("system", "developer")]
            if not old:
                raise ValueError(
                    f"the context has room for {room} tokens before a reply, and the last message needs {len(ids)}; shorten it, "
                    "or lower max_new_tokens"
                )
            del kept[old[0]]
            while old[0] < len(kept) - 1 and kept[old[0]]["role"] == "assistant":
                del kept[old[0]]
        return kept, ids

    def _for_template(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """developer as system, which it replaces in OpenAI's protocol, unless the template knows it; neighbouring system
        messages as one, because templates expect one at most."""
        knows = self.template is not None and "developer" in self.template.source
        found: list[dict[str, str]] = []
        for message in messages:
            role = "system" if message["role"] == "developer" and not knows else message["role"]
            last = found[-1] if found else {"role": ""}
            if role == last["role"] and role in ("system", "developer"):
                last["content"] += "\n\n" + message["content"]
            else:
                found.append({**message, "role": role})
        return found


def checked(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Messages as role, content (a text) and perhaps name.

    Raises:
        ValueError: a message without these, or with what is not supported; the error names it.
    """
    found = []
    for n, message in enumerate(messages):
        where = f"messages[{n}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is a {type(message).__name__}; expected an object with role and content")
        role = message.get("role")
        if role in ("tool", "function") or message.get("tool_calls") or message.get("function_call"):
            raise ValueError(f"{where}: tools are not supported; give messages of {', '.join(ROLES)} with texts")
        if role not in ROLES:
            got = "has no role" if role is None else f"has the role {role!r}"
            raise ValueError(f"{where} {got}; expected one of {', '.join(ROLES)}")
        others = [key for key, value in message.items() if key not in _KEYS and value]  # clients send back refusal=null
        if others:
            raise ValueError(f"{where}.{others[0]} is not supported; expected role, content and name")
        whole = {"role": role, "content": content_text(where, message.get("content"))}
        name = message.get("name")
        if name is not None and not isinstance(name, str):
            raise ValueError(f"{where}.name is {name!r}; expected a text")
        found.append({**whole, "name": name} if name else whole)
    if not found:
        raise ValueError("messages is empty; expected at least one message with role and content")
    return found


def continued(template: ChatTemplate, messages: Messages) -> str:
    """The text of a conversation up to the end of its last message, which is to be continued; as transformers'
    `apply_chat_template(continue_final_message=True)`.

    Raises:
        ValueError: as `ChatTemplate.render`; or the template does not write that message.
    """
    if not messages:
        return template.render(messages)  # raises ValueError
    last = content_text("the last message", messages[-1].get("content"))
    text = template.render([*messages[:-1], {**messages[-1], "content": last + _CONTINUED}])
    end = text.rfind(_CONTINUED.strip())
    if end < 0:
        raise ValueError("chat template: it does not write the last message as it is, so that nothing can continue it")
    return text[:end] if text.startswith(_CONTINUED, end) else text[:end].rstrip()


def check_effort(effort: Any) -> None:
    """Raise ValueError for a reasoning_effort that is not one of EFFORTS; None: none is given."""
    if effort not in (None, *EFFORTS):
        raise ValueError(f"`{REASONING}` is {effort!r}; expected one of {', '.join(EFFORTS)}")


def _marked(value: Any, pattern: re.Pattern[str]) -> Any:
    """A value of JSON, in whose texts each match stands between our marks."""
    if isinstance(value, str):
        return pattern.sub(f"{_OPEN}\\g<0>{_CLOSE}", re.sub(f"[{_OPEN}{_CLOSE}]", "", value))
    if isinstance(value, dict):
        return {_marked(key, pattern): _marked(x, pattern) for key, x in value.items()}
    return [_marked(x, pattern) for x in value] if isinstance(value, list) else value


def _turn_ends(template: ChatTemplate) -> tuple[str, str]:
    """The texts that a template writes behind a reply that is the last message, and between one and the message behind it; "":
    none, or it refuses to."""
    reply, after = _PROBE
    messages = [
        {"role": role, "content": text} for role, text in (("user", "a"), ("assistant", reply), ("user", after))
    ]
    found = []
    for several in (messages[:2], messages):
        try:
            match = re.search(f"{reply}(.*?)(?:{after}|$)", template.render(several), re.S)
        except ValueError:  # a template for other conversations; its own error says so when it is used
            match = None
        found.append(match[1] if match else "")
    return found[0], found[1]


def _specials(tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(getattr(getattr(tokenizer, "inner", tokenizer), "specials", ()))
