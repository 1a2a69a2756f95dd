"""GPT and BERT models, their configurations and their checkpoints."""

from gptfast.config import PRESETS, GPTConfig
from gptfast.models.bert import BERT, load_model
from gptfast.models.gpt import GPT
from gptfast.nn.kv_cache import KVCache

__all__ = ["BERT", "GPT", "PRESETS", "GPTConfig", "KVCache", "load_model"]
