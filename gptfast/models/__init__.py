"""GPT models, their configurations and their checkpoints."""

from gptfast.models.config import PRESETS, GPTConfig
from gptfast.models.gpt import GPT
from gptfast.models.kv_cache import KVCache

__all__ = ["GPT", "PRESETS", "GPTConfig", "KVCache"]
