"""What tests share: models, servers, the emulator as a backend, properties that every op has."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the source tree
# Instruction sets of x86-64 that multiply pairs of bfloat16, for which their conversion takes numbers below 2^-126 for 0.
X86_PAIRS = ("avx512_bf16", "amx")
