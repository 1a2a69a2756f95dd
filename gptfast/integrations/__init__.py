"""Models of other packages on the ops of gptfast: `accelerate` patches a model in place, `restore` undoes it.

Importing this package imports neither transformers nor peft; what needs them is imported with the first model of theirs.
"""

from __future__ import annotations

from gptfast.integrations.patch import accelerate, restore
from gptfast.integrations.report import Report

__all__ = ["Report", "accelerate", "restore"]
