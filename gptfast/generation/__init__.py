"""Continuing text: greedy, sampling, beams and speculation over running sequences of any lengths."""

from gptfast.generation.config import GenerationConfig
from gptfast.generation.decode import Generation, Step, generate, score, stream
from gptfast.generation.request import Request, Token
from gptfast.generation.scheduler import Scheduler
from gptfast.generation.sequences import CachedSequences, LanguageModel, Sequences

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
