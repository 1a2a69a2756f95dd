"""Adapters of a GPT: low-rank updates of its layers, in peft's format."""
