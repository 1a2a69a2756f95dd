"""A run that is ready to train."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptfast.data import PreparedData
from gptfast.machine import has_amx
from gptfast.ops.gemm import implementations_of, use_implementations
from gptfast.training.checkpoint import Checkpoint
from gptfast.training.trainer import Trainer


@dataclass(frozen=True)
class Run:
    """A Trainer that is ready, and its data.

    checkpoint: where the run was resumed, or None.
    note: a sentence about the model, or "".
    damage: sentences about newer checkpoints that are damaged.
    fit: a sentence about the batch size that was found, or "".
    """

    trainer: Trainer
    data: PreparedData
    checkpoint: Checkpoint | None
    note: str = ""
    damage: tuple[str, ...] = ()
    fit: str = ""

    def changed_arithmetic(self) -> list[str]:
        """The settings that decide how numbers are rounded and that differ from those before the run was resumed."""
        if self.checkpoint is None:
            return []
        stored, old, new = self.checkpoint, self.checkpoint.config, self.trainer.config
        changed = [f"`{name}`" for name in ("dtype", "device", "compile") if getattr(old, name) != getattr(new, name)]
        with use_implementations(stored.gemm):
            ways = implementations_of(old.dtype)
        if any(ways.get(layout, way) != way for layout, way in stored.gemm.items()):
            changed.append("GPTFAST_GEMM")
        libraries = any(way != "own" for way in ways.values()) or (new.optimizer == "muon" and has_amx())
        if stored.threads != torch.get_num_threads() and libraries and self.trainer.device.type == "cpu":
            changed.append("`threads`")
        return changed
