"""Generation with a compiled model: the common options inside the engine, all others by `gptfast.generation`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gptfast.engine.runner import empty_logits
from gptfast.engine.transparent import engine_for
from gptfast.generation import GenerationConfig
from gptfast.generation import generate as generate_by_steps
from gptfast.generation.arguments import unpack
from gptfast.generation.prompts import read_prompts
from gptfast.generation.runner import Sampling
from gptfast.generation.sampling import FAULTS
from gptfast.generation.textless import choosing_text
from gptfast.nn.transformer import Transformer

if TYPE_CHECKING:
    from gptfast.engine.compiled import CompiledGPT

INSIDE = (
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "eos_token_id",
    "pad_token_id",
    "usable_vocab",
    "num_return_sequences",
)
SERIAL = 16384  # values, half of what torch shares out among threads
BLOCK = 16  # tokens between two looks at the keyboard (Ctrl-C)


def generate(model: CompiledGPT, ids: Any, **options: Any) -> Any:
    """Continue `ids`; see `gptfast.generation.generate`, whose tokens these are."""
    ids, mask, options = unpack(ids, options)
    names = {field.name for field in fields(GenerationConfig)}
    known = names.issuperset(options.keys() - {"tokenizer"})
    config = GenerationConfig.of(**{name: options[name] for name in options.keys() & names}) if known else None
    if config is not None:
        config = choosing_text(config, options.get("tokenizer"), model.config.vocab_size)
    if config is None or not runs_inside(config):
        return generate_by_steps(model, ids, attention_mask=mask, **_with_quick_assistant(options))
    prompts, config = read_prompts(ids, mask, model, config)
    rows = _generate(model, prompts.rows, config.with_seed(), apart=config.seed is None)
    return prompts.returned(rows, config)


def _with_quick_assistant(options: dict[str, Any]) -> dict[str, Any]:
    """The options with the engine behind the assistant too, where it can run that: torch would be slower than the model."""
    assistant = options.get("assistant_model")
    engine = engine_for(assistant) if isinstance(assistant, Transformer) else None
    return options if engine is None else {**options, "assistant_model": engine}


def runs_inside(config: GenerationConfig) -> bool:
    """Whether the engine's own loop knows all that the config asks for."""
    plain = GenerationConfig()
    names = [field.name for field in fields(config) if field.name not in INSIDE]
    return all(getattr(config, name) == getattr(plain, name) for name in names)


def _generate(model: CompiledGPT, prompts: list[list[int]], config: GenerationConfig, apart: bool) -> list[list[int]]:
    """The texts. `apart`: nobody named the seed, and equal prompts get different draws."""
    copies, total = config.num_return_sequences, len(prompts) * config.num_return_sequences
    sequences = model.sequences(total, max(map(len, prompts)) + config.max_new_tokens)
    texts = [list(prompt) for prompt in prompts for _ in range(copies)]
    first = sequences.add(len(prompts))
    read = sequences.extend(first, prompts)
    logits = read if copies == 1 else empty_logits(total, model.config.vocab_size)
    rows: list[int] = []
    for n, row in enumerate(first):
        rows += [row, *(sequences.add(copies - 1, like=row) if copies > 1 else [])]
        if copies > 1:
            for copy in logits[n * copies : (n + 1) * copies]:
                _copy(copy, read[n])
    active, temperature, seed = list(range(total)), config.temperature if config.draws else 0.0, config.seed or 0
    for begin in range(0, config.max_new_tokens, BLOCK):
        steps = min(BLOCK, config.max_new_tokens - begin)
        new = sequences.decode(
            [rows[n] for n in active],
            logits,
            steps=steps,
            more=begin + steps < config.max_new_tokens,
            samplings=[
                Sampling(temperature, config.top_k, config.top_p, seed, n if apart else n % copies, config.usable_vocab)
                for n in active
            ],
            ends=config.eos_ids,
        )
        for n, tokens in zip(active, new, strict=True):
            texts[n] += tokens
            if tokens[-1] < 0:
                raise RuntimeError(FAULTS[tokens[-1]])
        active = [n for n, tokens in zip(active, new, strict=True) if tokens[-1] not in config.eos_ids]
        if not active:
            break
    return texts


def _copy(target: Tensor, source: Tensor) -> None:
    """In pieces that torch copies on one thread: its others would go on spinning, on cores that the engine needs."""
    for to, part in zip(target.split(SERIAL), source.split(SERIAL), strict=True):
        to.copy_(part)
