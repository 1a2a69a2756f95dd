"""Chat templates: Jinja2 in a sandbox, as tokenizer_config.json of transformers holds them, and where the replies are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from traceback import walk_tb
from typing import Any

from gptfast.tokenizer.added import CONFIG, template_of
from gptfast.tokenizer.base import Tokenizer
from gptfast.tokenizer.bpe import BPETokenizer
from gptfast.tokenizer.hf import HFTokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
PLAIN = (  # roles in words, and no token but the end token that the tokenizer has
    "{% for message in messages %}"
    "{{ message['role'] | capitalize + ':\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\n' }}{% endif %}"
)
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")

Message = Mapping[str, Any]
Span = tuple[int, int]


class ChatTemplate:
    """A chat template. The text is that of transformers' `apply_chat_template`.

    Args:
        source: Jinja2. `{% generation %}` … `{% endgeneration %}` around a reply says what the model learns.
        variables: what the template knows beside the messages, such as bos_token.
    Raises:
        ImportError: jinja2 is not installed.  ValueError: the template is no Jinja2.
    """

    def __init__(self, source: str, variables: Mapping[str, Any] | None = None) -> None:
        self.source, self.variables = source, dict(variables or {})
        self._compiled = _compiled(source)

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template that a tokenizer has, with its special tokens; None where it has none."""
        settings = json.loads(tokenizer.files()[CONFIG])
        source = template_of(settings)
        if source is None:
            return None
        named = {name: settings[name] for name in _NAMES if settings.get(name) is not None}
        return cls(source, {name: x["content"] if isinstance(x, dict) else x for name, x in named.items()})

    @property
    def marks_replies(self) -> bool:
        return _MARKS.search(self.source) is not None

    @cached_property
    def names(self) -> frozenset[str]:
        """The variables that it reads, `messages` among them."""
        from jinja2.meta import find_undeclared_variables

        return frozenset(find_undeclared_variables(self._compiled.environment.parse(self.source)))

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, **variables: Any) -> str:
        """The text of a conversation.

        Args:
            messages: with "role" and "content"; at least one.
            add_generation_prompt: with the beginning of a reply at the end.
            variables: for the template, such as tools.
        Raises:
            ValueError: no messages, or the template refuses them.
        """
        return self._render(messages, add_generation_prompt, variables)[0]

    def render_with_replies(self, messages: Sequence[Message], **variables: Any) -> tuple[str, list[Span]]:
        """The text of a conversation, and the characters of the replies in it.

        Replies are what the template marks; where it has no marks, what each message of the assistant adds to the text with
        the generation prompt before it.

        Raises:
            ValueError: as `render`; or the template has no marks and the text of a conversation does not begin with that of
                its first messages.
        """
        text, spans = self._render(messages, False, variables)
        return text, spans if self.marks_replies else self._added(text, messages, variables)

    def readable(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as this template reads them: contents that are lists of parts stay where it writes a part as it writes a text, as
        templates of Hugging Face do that know parts; else they are texts.

        Raises:
            ValueError: a content that is neither a text nor a list of texts.
        """
        lists = [n for n, message in enumerate(messages) if isinstance(message.get("content"), list)]
        texts = [dict(message) for message in messages]
        for n in lists:
            texts[n]["content"] = content_text(f"messages[{n}]", messages[n]["content"])
        if not lists:
            return texts
        parts = [dict(message) for message in texts]
        for n in lists:
            parts[n]["content"] = [{"type": "text", "text": texts[n]["content"]}]
        try:
            knows = self.render(parts) == self.render(texts)
        except ValueError:  # it adds a list to a text
            knows = False
        return [dict(message) for message in messages] if knows else texts

    def _added(self, text: str, messages: Sequence[Message], variables: dict[str, Any]) -> list[Span]:
        spans = []
        for n, message in enumerate(messages):
            if message.get("role") == "assistant":
                before = self._render(messages[:n], True, variables)[0] if n else ""
                after = self._render(messages[: n + 1], False, variables)[0]
                if not (text.startswith(after) and after.startswith(before)):
                    raise ValueError(
                        "chat template: it writes the first messages of a conversation otherwise when others follow; mark the "
                        "replies in it with {% generation %} and {% endgeneration %}"
                    )
                spans.append((len(before), len(after)))
        return spans

    def _render(self, messages: Sequence[Message], prompt: bool, variables: dict[str, Any]) -> tuple[str, list[Span]]:
        if not messages:
            raise ValueError("chat template: there are no messages; give at least one")
        plain = [{name: x for name, x in json.loads(json.dumps(dict(m))).items() if x is not None} for m in messages]
        environment: Any = self._compiled.environment
        blocks: list[str] = []
        given = {**self.variables, "tools": None, "documents": None, **variables}
        try:
            with environment.following(blocks) as spans:
                for block in self._compiled.generate(messages=plain, add_generation_prompt=prompt, **given):
                    blocks.append(block)
        except _errors() as error:
            what = str(error) if _is_template_error(error) else f"{type(error).__name__}: {error}"
            line = _line(error)
            where = f" (in line {line})" if line else ""
            raise ValueError(f"chat template: {what}{where}; change the messages or the template") from error
        return "".join(blocks), spans


def content_text(where: str, content: Any) -> str:
    """The text of a message: a text, or parts of the type text, which are joined with newlines.

    Raises:
        ValueError: something else; the error begins with `where`, the name of the message.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        got = "has no content" if content is None else f"has the content {content!r:.60}"
        raise ValueError(f"{where} {got}; expected a text, or a list of parts of the type text")
    texts = []
    for n, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") is None:
            raise ValueError(f'{where}.content[{n}] is {part!r:.60}; expected {{"type": "text", "text": ...}}')
        if (kind := part["type"]) != "text":
            raise ValueError(
                f"{where}.content[{n}] is of the type {kind!r}; this model reads texts only - expected the type text"
            )
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.content[{n}].text is {part.get('text')!r:.60}; expected a text")
        texts.append(part["text"])
    return "\n".join(texts)


def with_chat_template(tokenizer: Tokenizer, source: str | None) -> Tokenizer:
    """A tokenizer that saves a chat template in its tokenizer_config.json; None: without one.

    Raises:
        TypeError: a tokenizer of characters, words or GPT-1's, which finds no special tokens in a text.
        ImportError, ValueError: as `ChatTemplate`.
    """
    if source is not None:
        _compiled(source)
    inner: Any = getattr(tokenizer, "inner", tokenizer)
    if isinstance(inner, HFTokenizer):
        return HFTokenizer(replace(inner.hf_files, settings=_changed(inner.hf_files.settings, source)))
    if isinstance(inner, BPETokenizer):
        eos = next((token for token, i in inner.specials.items() if i == inner.eos_id), None)
        return BPETokenizer(inner.vocab, inner.merges, eos, _changed(inner.settings, source))
    raise TypeError(
        f"chat template: the tokenizer is a {type(inner).__name__}, which finds no special tokens in a text; use a BPE "
        "(--tokenizer bpe or gpt2)"
    )


def encode_with_spans(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
    """The ids of a text, special tokens as their ids, and 1 for each token that has a character in one of the spans.

    Raises:
        TypeError: as `with_chat_template`.  ValueError: the tokenizer changes the text, so that places in it are not known.
    """
    inner: Any = getattr(tokenizer, "inner", tokenizer)
    if isinstance(inner, HFTokenizer):
        ids, offsets = inner.encode_with_offsets(text)
        return ids, _mask(offsets, spans)
    if not isinstance(inner, BPETokenizer):
        with_chat_template(tokenizer, None)  # raises TypeError
    ids = inner.encode(text, allowed_special="all")
    offsets, end = [], 0
    for token in ids:
        start, end = end, end + len(inner.decode_bytes([token]))
        offsets.append((start, end))
    places = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    return ids, _mask(offsets, places)


def encode_chat(tokenizer: Tokenizer, text: str, special: bool = True) -> list[int]:
    """The ids of a rendered conversation, without tokens that the tokenizer would add to a text.

    Args:
        special: special tokens as their ids. False: as ordinary text.
    Raises:
        TypeError: as `with_chat_template`.
    """
    inner: Any = getattr(tokenizer, "inner", tokenizer)
    if special or not isinstance(inner, (HFTokenizer, BPETokenizer)):
        return encode_with_spans(tokenizer, text, ())[0]
    return inner.encode_plain(text) if isinstance(inner, HFTokenizer) else inner.encode(text)


def encode_bare(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text, special tokens as their ids, without tokens that the tokenizer would add to it."""
    inner: Any = getattr(tokenizer, "inner", tokenizer)
    if isinstance(inner, HFTokenizer):
        return inner.encode_with_offsets(text)[0]
    return inner.encode(text, allowed_special="all")


def _mask(offsets: Sequence[Span], spans: Sequence[Span]) -> list[int]:
    found, n = [], 0
    for start, end in offsets:
        while n < len(spans) and start >= spans[n][1]:
            n += 1
        found.append(int(n < len(spans) and end > spans[n][0]))
    return found


def _changed(settings: Mapping[str, Any], source: str | None) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name != "chat_template"}
    return kept if source is None else {**kept, "chat_template": source}


def _errors() -> tuple[type[Exception], ...]:
    from gptfast.tokenizer.sandbox import ERRORS

    return ERRORS


def _is_template_error(error: Exception) -> bool:
    from jinja2.exceptions import TemplateError

    return isinstance(error, TemplateError)


def _line(error: BaseException) -> int | None:
    """The line of the template in which an error was raised; jinja2 gives the frames of a template its lines."""
    frames = [number for frame, number in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return frames[-1] if frames else None


@lru_cache(maxsize=16)
def _compiled(source: str) -> Any:
    try:
        from gptfast.tokenizer.sandbox import environment
    except ImportError as error:
        raise ImportError("chat templates need jinja2: pip install 'gptfast-kernels[finetune]' (or jinja2)") from error
    try:
        return environment().from_string(source)
    except _errors() as error:
        raise ValueError(f"chat template: {error} in line {getattr(error, 'lineno', '?')}; correct it") from error
