"""gptfast: GPTs that train, fine-tune and generate fast on the machine you have."""

from importlib.metadata import PackageNotFoundError, version

from gptfast import engine, nn, ops
from gptfast.backend import backend
from gptfast.malloc import tune_malloc
from gptfast.models import GPT, GPTConfig

try:
    __version__ = version("gptfast-kernels")
except PackageNotFoundError:  # imported from a source folder that was never installed
    __version__ = "0+source"

__all__ = ["GPT", "GPTConfig", "backend", "engine", "nn", "ops", "tune_malloc"]
