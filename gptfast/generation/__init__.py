"""Continuing text: greedy, sampling and beam search over a KV cache, for batches of prompts of any lengths."""

from gptfast.generation.config import GenerationConfig
from gptfast.generation.decode import Step, generate, stream

__all__ = ["GenerationConfig", "Step", "generate", "stream"]
