"""GPT models, their configurations and their checkpoints."""

from gptfast.config import PRESETS, GPTConfig
from gptfast.models.gpt import GPT
from gptfast.nn.kv_cache import KVCache

__all__ = ["GPT", "PRESETS", "GPTConfig", "KVCache"]
