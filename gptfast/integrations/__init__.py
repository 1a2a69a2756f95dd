"""Models of other packages on the ops of gptfast: `accelerate` patches a model in place, `restore` undoes it.

Importing this package imports neither transformers nor peft; what needs them is imported with the first model of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names

if TYPE_CHECKING:
    from gptfast.integrations.patch import accelerate, restore
    from gptfast.integrations.report import Report

__all__ = ["Report", "accelerate", "restore"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "accelerate": "gptfast.integrations.patch",
        "restore": "gptfast.integrations.patch",
        "Report": "gptfast.integrations.report",
    },
)
