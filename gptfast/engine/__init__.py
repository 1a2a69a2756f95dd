"""The native CPU engine: GPTs packed in 32 to 4 bits a weight, for generation."""

from gptfast.engine.compiled import CompiledGPT
from gptfast.engine.formats import FORMATS
from gptfast.engine.loading import load
from gptfast.engine.packing import compile_model
from gptfast.engine.runner import EngineRunner
from gptfast.engine.transparent import engine_for, forget

__all__ = ["FORMATS", "CompiledGPT", "EngineRunner", "compile_model", "engine_for", "forget", "load"]
