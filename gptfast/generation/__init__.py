"""Continuing text: greedy, sampling, beams and speculation over running sequences of any lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names

if TYPE_CHECKING:
    from gptfast.generation.api import Generation, Step, generate, score, stream
    from gptfast.generation.config import GenerationConfig
    from gptfast.generation.request import Request, Token
    from gptfast.generation.runner import LanguageModel, Sequences
    from gptfast.generation.scheduler import Scheduler
    from gptfast.generation.torch_runner import CachedSequences

__all__ = [
    "CachedSequences",
    "Generation",
    "GenerationConfig",
    "LanguageModel",
    "Request",
    "Scheduler",
    "Sequences",
    "Step",
    "Token",
    "generate",
    "score",
    "stream",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GenerationConfig": "gptfast.generation.config",
        **dict.fromkeys(("Generation", "Step", "generate", "score", "stream"), "gptfast.generation.api"),
        **dict.fromkeys(("Request", "Token"), "gptfast.generation.request"),
        "Scheduler": "gptfast.generation.scheduler",
        **dict.fromkeys(("LanguageModel", "Sequences"), "gptfast.generation.runner"),
        "CachedSequences": "gptfast.generation.torch_runner",
    },
)
