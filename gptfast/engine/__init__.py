"""The native CPU engine: GPTs packed in 32 to 4 bits a weight, for generation."""

from gptfast.engine.automatic import engine_for, forget
from gptfast.engine.compiled import CompiledGPT, compile_model, load
from gptfast.engine.formats import FORMATS
from gptfast.engine.sequences import EngineSequences

__all__ = ["FORMATS", "CompiledGPT", "EngineSequences", "compile_model", "engine_for", "forget", "load"]
