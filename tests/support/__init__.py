"""What tests share: models, servers, the emulator as a backend, properties that every op has."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the source tree
