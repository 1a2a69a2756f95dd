"""Text generation: greedy search, sampling, beam search and speculative decoding, with continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names

if TYPE_CHECKING:
    from gptfast.generation.api import Generation, Step, generate, stream
    from gptfast.generation.config import GenerationConfig
    from gptfast.generation.cuda_graphs import CudaGraphRunner
    from gptfast.generation.request import Request, Sequence, Token
    from gptfast.generation.runner import LanguageModel, Runner
    from gptfast.generation.scheduler import Scheduler
    from gptfast.generation.scoring import score
    from gptfast.generation.torch_runner import TorchRunner

__all__ = [
    "CudaGraphRunner",
    "Generation",
    "GenerationConfig",
    "LanguageModel",
    "Request",
    "Runner",
    "Scheduler",
    "Sequence",
    "Step",
    "Token",
    "TorchRunner",
    "generate",
    "score",
    "stream",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "GenerationConfig": "gptfast.generation.config",
        **dict.fromkeys(("Generation", "Step", "generate", "stream"), "gptfast.generation.api"),
        **dict.fromkeys(("Request", "Sequence", "Token"), "gptfast.generation.request"),
        "Scheduler": "gptfast.generation.scheduler",
        "score": "gptfast.generation.scoring",
        **dict.fromkeys(("LanguageModel", "Runner"), "gptfast.generation.runner"),
        "TorchRunner": "gptfast.generation.torch_runner",
        "CudaGraphRunner": "gptfast.generation.cuda_graphs",
    },
)
