"""Continuing text: greedy, sampling, beams and speculation over running sequences of any lengths."""

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
