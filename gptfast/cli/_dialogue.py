"""The conversation of `gptfast chat`: its messages, its replies, and the commands between them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast._files import atomic_write
from gptfast.generation import stream
from gptfast.generation.config import GenerationConfig
from gptfast.generation.runner import virtual_tokens
from gptfast.metadata import end_option, metadata_of
from gptfast.serving.text import ChoiceText
from gptfast.tokenizer.conversation import NONE, ChatFormat

if TYPE_CHECKING:
    from gptfast.models import GPT
    from gptfast.tokenizer import Tokenizer

LEAST_ROOM = 256  # tokens kept free for a reply whose length is not given, at most a quarter of the context
PROMPT = "> "
HELP = """/reset        forget the conversation; the system text stays
/regenerate   another reply to the last message
/save FILE    write the conversation as a line of JSON, {"messages": [...]}, which `gptfast finetune --data` reads
/help         this list
/exit         end, as Ctrl-D; Ctrl-C stops a reply"""


class Dialogue:
    """A conversation with a model.

    messages: what was said, the system text first. left_out: how many of the oldest messages the last reply did not see.

    Args:
        gpt, tokenizer: the model.
        options: arguments of `gptfast.generation.stream`; seed is one of them.
        system: instructions before the conversation; None: none.
        special: see `ChatFormat.prompt`.
        variables: for the chat template, see `ChatFormat.checked_variables`.
    Raises:
        ValueError: variables that the template does not take, or a max_new_tokens beside which nothing has room.
    """

    def __init__(
        self,
        gpt: GPT,
        tokenizer: Tokenizer,
        options: dict[str, Any],
        system: str | None = None,
        special: bool = True,
        variables: Mapping[str, Any] = NONE,
    ) -> None:
        self.format = ChatFormat.of(tokenizer)
        self._variables = self.format.checked_variables(variables)
        self._gpt, self._tokenizer, self._special = gpt, tokenizer, special
        self._system = [{"role": "system", "content": system}] if system else []
        self._seed, self._attempt, self._limit = options["seed"], 0, options.get("max_new_tokens")
        given = options.get("stop_strings") or ()
        self._stops = [*([given] if isinstance(given, str) else given), *self.format.stops]
        ends = GenerationConfig(eos_token_id=options.get("eos_token_id")).eos_ids
        self._ends = metadata_of(gpt).reply_ends(ends, self.format.end_ids)
        self._options = {**options, "stop_strings": self._stops, "eos_token_id": end_option(self._ends)}
        self._block = gpt.config.block_size - virtual_tokens(gpt)
        if self._limit is not None and self._limit >= self._block:
            raise ValueError(
                f"chat: `max_new_tokens` is {self._limit}; the context of this model is {self._block} tokens, and the "
                "conversation needs some of them - lower max_new_tokens"
            )
        self._saved: set[Path] = set()
        self.messages, self.left_out = list(self._system), 0

    @property
    def has_reply(self) -> bool:
        """Whether the last message is the model's."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    def reset(self) -> None:
        """Begin again, with the system text alone."""
        self.messages, self.left_out = list(self._system), 0

    def ask(self, text: str) -> None:
        """Add a message of the user."""
        self.messages.append({"role": "user", "content": text})

    def withdraw(self) -> None:
        """Take back the last message."""
        self.messages.pop()

    def another(self) -> None:
        """Take back the last reply; the next one is drawn from another seed."""
        self.withdraw()
        self._attempt += 1

    def fit(self) -> tuple[list[int], int]:
        """The prompt of the next reply, and how many of the oldest messages it leaves out. Raises ValueError: too long."""
        free = self._limit or min(LEAST_ROOM, max(1, self._block // 4))
        kept, ids = self.format.fitted(self.messages, self._block - free, self._special, self._variables)
        return ids, len(self.messages) - len(kept)

    def reply(self, prompt: list[int]) -> Iterator[str]:
        """Generate the reply to a prompt and yield it piece by piece; it becomes a message, also if it is interrupted."""
        room = self._block - len(prompt)
        options = {**self._options, "max_new_tokens": min(self._limit or room, room)}
        options["seed"] = (self._seed + self._attempt) % 2**64
        plain = self.format.template is None
        text = ChoiceText(self._tokenizer, self._stops, self._ends, flush=plain, channels=self.format.channels())
        message = {"role": "assistant", "content": ""}
        self.messages.append(message)
        for step in stream(self._gpt, [prompt], tokenizer=self._tokenizer, **options):
            if step.tokens[0] is not None and (piece := text.push(step.tokens[0])):
                message["content"] += piece
                yield piece
        rest = text.finish()
        message["content"] += rest
        yield rest

    def save(self, path: Path) -> None:
        """Write the conversation. Raises ValueError: a file that this dialogue has not written is there."""
        if path.exists() and path.resolve() not in self._saved:
            raise ValueError(f"{path} exists; name another file")
        atomic_write(path, json.dumps({"messages": self.messages}, ensure_ascii=False).encode() + b"\n")
        self._saved.add(path.resolve())


def converse(dialogue: Dialogue) -> None:
    """Answer the lines of standard input until it ends, or /exit."""
    if dialogue.format.template is None:
        _tell(
            "the tokenizer has no chat template: the conversation is a plain transcript (System:, User:, Assistant:), which a "
            "model that has not learnt chats continues as it can"
        )
    interactive = sys.stdin.isatty()
    if interactive:
        _tell("/help lists the commands; Ctrl-C stops a reply, Ctrl-D ends")
    for line in _lines(interactive):
        if line.startswith("/"):
            if line.split()[0] in ("/exit", "/quit"):
                return
            if not _command(dialogue, line):
                continue
        elif line.strip():
            dialogue.ask(line)
        else:
            continue
        try:
            _answer(dialogue)
        except ValueError as error:  # such as a message that is longer than the context
            if not interactive:
                raise
            dialogue.withdraw()
            _tell(f"error: {error}")


def _lines(interactive: bool) -> Iterator[str]:
    """The lines of standard input, of the terminal with editing where Python has readline."""
    if not interactive:
        try:
            for line in sys.stdin.buffer:
                yield line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat: standard input is not UTF-8 ({error}); expected UTF-8 text") from None
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input uses it)
    while True:
        try:
            yield input(PROMPT)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _tell("(/exit or Ctrl-D ends)")


def _command(dialogue: Dialogue, line: str) -> bool:
    """Obey a command; returns whether a reply is to follow."""
    name, _, rest = line.partition(" ")
    if name == "/reset":
        dialogue.reset()
        _tell("(a new conversation)")
    elif name == "/regenerate":
        if dialogue.has_reply:
            dialogue.another()
            return True
        _tell("there is no reply yet")
    elif name == "/save":
        _save(dialogue, rest.strip())
    elif name == "/help":
        _tell(HELP)
    else:
        _tell(f"{name} is no command; /help lists them")
    return False


def _save(dialogue: Dialogue, name: str) -> None:
    if not name:
        return _tell("/save needs the name of a file")
    try:
        dialogue.save(Path(name))
    except (OSError, ValueError) as error:
        return _tell(f"error: {error}")
    _tell(f"({len(dialogue.messages)} messages in {name})")


def _answer(dialogue: Dialogue) -> None:
    """Print the reply to the last message."""
    ids, left_out = dialogue.fit()
    if left_out != dialogue.left_out:
        _tell(f"(the context is full: the oldest {left_out} messages of the conversation are left out)")
        dialogue.left_out = left_out
    try:
        for piece in dialogue.reply(ids):
            print(_shown(piece), end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        _tell("(stopped)")


def _shown(text: str) -> str:
    """The text for the terminal, without control characters, which could change more than the reply."""
    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
