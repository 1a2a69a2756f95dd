"""gptfast chat: a conversation with a model on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from typing import Any

from gptfast._options import option, values_of
from gptfast.cli._load import MODEL_HELP, QUANTIZE_HELP, SPECIAL_TOKENS_HELP, STOP_HELP, TOKENIZER_HELP, load
from gptfast.cli._options import Change, Options, takes
from gptfast.cli.generate import DRAWING, SEED, TEMPERATURE, defaults_of, with_drawing
from gptfast.generation.config import GenerationConfig
from gptfast.tokenizer.conversation import EFFORTS, REASONING, check_effort


@dataclass(frozen=True)
class ChatOptions:
    """The options of `gptfast chat` beside those of generation."""

    model: str = option(MISSING, MODEL_HELP)
    system: str | None = option(None, "Instructions that stand before the conversation; /reset keeps them.")
    adapter: str | None = option(None, "Folder of an adapter of the model, by GPT.save_adapter or peft.")
    tokenizer: str | None = option(None, TOKENIZER_HELP, words="the checkpoint's own")
    special_tokens: bool = option(True, SPECIAL_TOKENS_HELP)
    quantize: str | None = option(None, f"{QUANTIZE_HELP}.")
    reasoning_effort: str | None = option(
        None,
        "How long a model thinks before it replies, where its chat template asks for that, as gpt-oss' does.",
        words="as the template has it",
        allowed=EFFORTS,
    )


_GENERATION: Sequence[str] = (
    "max_new_tokens",
    *DRAWING,
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size", "stop_strings", "seed"),
)
_CHANGES = {
    "max_new_tokens": Change(help="Largest number of tokens of a reply.", words="as many as the context has room for"),
    "temperature": Change(default=TEMPERATURE),
    "seed": Change(default=SEED, more="/regenerate takes the next one."),
    "stop_strings": Change(name="stop", type=list[str], help=STOP_HELP),
}


@takes(Options(ChatOptions), Options(GenerationConfig, _GENERATION, changes=_CHANGES))
def chat(given: dict[str, Any]) -> None:
    """Talk with a model; its replies appear token by token.

    The conversation is written by the tokenizer's chat template. A model without one, such as a GPT-2 that was only
    pre-trained, gets a plain transcript (System:, User:, Assistant:), and the first line says so. Where the conversation
    outgrows the context, the oldest messages are left out, with a notice.

    Lines that begin with / are commands: /reset, /regenerate, /save FILE, /help, /exit. Ctrl-C stops a reply, Ctrl-D ends.
    Lines from a pipe are messages, one after another.

    [bold]Examples[/]

      [cyan]gptfast chat --model runs/assistant --system "Answer in one sentence."[/]

      [cyan]gptfast chat --model runs/bard/best --adapter runs/poems --quantize int8 --temperature 0.7[/]

      [cyan]echo "Who are you?" | gptfast chat --model runs/assistant[/]
    """
    options = ChatOptions(**values_of(ChatOptions, given))
    chosen = {"seed": SEED, **values_of(GenerationConfig, given)}
    GenerationConfig.of(**chosen)  # what is wrong is said before the model is loaded
    check_effort(options.reasoning_effort)
    adapters = {"default": options.adapter} if options.adapter else {}
    gpt, tokenizer = load(options.model, options.quantize, options.tokenizer, adapters)
    from gptfast.cli._dialogue import Dialogue, converse

    usual, drawing = defaults_of(gpt, tokenizer)
    variables = {REASONING: options.reasoning_effort}
    drawn = with_drawing({**usual, **chosen}, drawing)
    converse(Dialogue(gpt, tokenizer, drawn, options.system, options.special_tokens, variables))
