"""Loading the model and the tokenizer of a command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptfast.models import GPT
    from gptfast.tokenizer import Tokenizer

MODEL_HELP = (
    "Checkpoint folder, such as runs/bard/best, nanoGPT's ckpt.pt, or a Hugging Face hub id, also NAME@REVISION."
)
TOKENIZER_HELP = "How to cut text into tokens: gpt2, or the FOLDER of a tokenizer."
SPECIAL_TOKENS_HELP = "Read special tokens in prompts, such as <|endoftext|>, as such; without, as ordinary text."
QUANTIZED = "int8, int6, q4, int4, nf4, mxfp4, bf16 or fp32"
QUANTIZE_HELP = f"Pack the weights in {QUANTIZED} for the native CPU engine"
STOP_HELP = "End a text with the token that completes this string; may be given several times."
MOST_TEXTS = 1 << 16  # largest --batch-size; more would use much memory before the first token


def check_batch_size(command: str, batch_size: int) -> None:
    if not 1 <= batch_size <= MOST_TEXTS:
        raise ValueError(f"{command}: `batch_size` is {batch_size}; expected 1 to {MOST_TEXTS}")


def load(
    model: str, quantize: str | None, tokenizer: str | None = None, adapters: Mapping[str, str] | None = None
) -> tuple[Any, Tokenizer]:
    """A GPT, or a compiled one with `quantize`, and its tokenizer.

    Args:
        model: a checkpoint folder, nanoGPT's ckpt.pt, or a hub id.
        quantize: a format of `GPT.compile_for_inference`; None: the weights as they are.
        tokenizer: "gpt2" or a folder; None: the checkpoint's own, or that of the adapters, see `_adapters_tokenizer`.
        adapters: folders of adapters by name; the last one is active.
    """
    from gptfast._snapshots import read_whole
    from gptfast.models import GPT, packed
    from gptfast.models.locate import resolve
    from gptfast.models.pretrained import build
    from gptfast.models.stored import StoredModel
    from gptfast.tokenizer import lenient, load_tokenizer

    path = resolve(model)
    if quantize is not None:
        _check_format(quantize)
    if tokenizer is None:
        stored, found = read_whole(path, lambda: (StoredModel(path), _own_tokenizer(path)))
    else:
        stored, found = StoredModel(path), load_tokenizer(tokenizer)
    gpt: Any = build(GPT, stored, None, {}) if quantize is None else packed.build(stored, quantize)
    if adapters and quantize is None:
        _make_room(gpt, adapters)
    if adapters and tokenizer is None:
        found = _adapters_tokenizer(found, adapters, gpt.config.vocab_size)
    for name, folder in (adapters or {}).items():
        gpt.load_adapter(folder, name)
    return gpt, lenient(found)


def _check_format(quantize: str) -> None:
    from gptfast.engine.formats import format_name

    try:
        format_name(quantize)
    except ValueError:
        raise ValueError(f"`quantize` is {quantize!r}; expected one of {QUANTIZED}") from None


def _make_room(gpt: GPT, adapters: Mapping[str, str]) -> None:
    """Give a model rows for the new tokens of adapters, such as those of a chat, of which these have trained copies."""
    from gptfast.checkpoints.adapter_files import embedding_rows

    rows = max((embedding_rows(Path(folder)) or 0 for folder in adapters.values()), default=0)
    if rows > gpt.config.vocab_size:
        gpt.resize_token_embeddings(rows)


def _adapters_tokenizer(base: Tokenizer, adapters: Mapping[str, str], rows: int) -> Tokenizer:
    """The tokenizer of adapters that have the base's with more tokens or a chat template; else the base's.

    Args:
        base: the tokenizer of the model.
        adapters: folders by name.
        rows: of the model's embedding; a tokenizer with more tokens, as that of a classifier, is not used.
    Raises:
        ValueError: adapters with different ones.
    """
    from gptfast.tokenizer import has_tokenizer, load_tokenizer

    own: dict[str, Tokenizer] = {}
    for name, folder in adapters.items():
        found = load_tokenizer(folder) if has_tokenizer(folder) else base
        if base.vocab_size <= found.vocab_size <= rows and found.files() != base.files():
            own[name] = found
    first = next(iter(own.values()), base)
    for name, found in own.items():
        if found.files() != first.files():
            raise ValueError(
                f"{adapters[name]}: the adapter {name!r} has another tokenizer than {next(iter(own))!r}; run them apart, or name "
                "one with `tokenizer`"
            )
    return first


def _own_tokenizer(path: Path) -> Tokenizer:
    from gptfast.tokenizer import load_tokenizer

    try:
        if path.is_dir():
            return load_tokenizer(path)
        reason = f"{path} has no tokenizer"
    except FileNotFoundError as error:
        reason = str(error)
    raise FileNotFoundError(f"{reason}; or name the tokenizer of the model with --tokenizer: gpt2, or a FOLDER")
