"""Trainer: the training of a GPT or a BERT on tokens."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from gptfast._locks import FileLock
from gptfast.data import Mixture, TokenFile
from gptfast.machine import resolve_device
from gptfast.models import BERT, GPT
from gptfast.tokenizer import Tokenizer
from gptfast.training.checkpoint import Checkpoint
from gptfast.training.config import TrainConfig
from gptfast.training.language_modelling import LanguageModelling
from gptfast.training.loop import Loop
from gptfast.training.masked_language_modelling import MaskedLanguageModelling
from gptfast.training.memory import look_at_memory
from gptfast.training.ranks import Ranks
from gptfast.training.result import TrainResult
from gptfast.training.values import Values


class Trainer(Loop):
    """Trains a GPT, or with objective mlm a BERT, and writes RUN/last, RUN/best, RUN/log.jsonl, RUN/loss.png and, with experts,
    RUN/experts.png.

    Args:
        model: a float32 GPT or BERT; moved to the device of the config.
        train_tokens, val_tokens: token files, or (N,) arrays of ids; train_tokens may be a mixture.
        config: see `TrainConfig`.
        out: RUN, the folder to write.
        tokenizer: saved with every checkpoint; None: no tokenizer. Objective mlm needs one with [MASK].
        source: JSON values that describe the data, saved with every checkpoint; None: {}.
        resume: a checkpoint of `read_checkpoint` from which `model` was loaded. The run continues bit for bit as without
            an interruption. None: a new run.
        overwrite: delete the checkpoints of a run that `out` already has.
        progress: show progress.
        tensorboard: also write event files to RUN/tensorboard.
        values: of a model on the meta device that the ranks divide (`gptfast.training.values`). None: it has its own.
        async_save: write checkpoints in a thread while training goes on, from copies.
        log_to: also log to "tensorboard", "wandb" or "trackio"; None: none.
        lock: the acquired lock of `lock_run(out)`; released at the end of `train`. None: acquired here.
        ranks: the processes of the run, of which rank 0 writes and logs; each has the same arguments. None: this one alone.
        finished_too: a run that is complete may be resumed; it makes no step.
    Raises:
        TypeError, ValueError: a model of another dtype, too few tokens, tokens or a block_size that do not fit the model, an argument
            of another type, or a source that is not JSON.
        FileExistsError: `out` already has a run.
        BlockingIOError: another process trains in `out`.
        MemoryError: a step needs more memory than there is.
    """

    objective: LanguageModelling | MaskedLanguageModelling

    def __init__(
        self,
        model: GPT | BERT,
        train_tokens: TokenFile | Mixture | np.ndarray,
        val_tokens: TokenFile | np.ndarray,
        config: TrainConfig,
        out: str | os.PathLike[str],
        *,
        tokenizer: Tokenizer | None = None,
        source: dict[str, Any] | None = None,
        resume: Checkpoint | None = None,
        overwrite: bool = False,
        progress: bool = True,
        tensorboard: bool = False,
        log_to: str | None = None,
        async_save: bool = False,
        values: Values | None = None,
        lock: FileLock | None = None,
        ranks: Ranks | None = None,
        finished_too: bool = False,
    ) -> None:
        _check_kinds(model, config, resume)
        kind: Any = MaskedLanguageModelling if config.objective == "mlm" else LanguageModelling
        objective = kind(model, train_tokens, val_tokens, config, tokenizer, ranks)
        self.block_size, self.sampler, self.val_tokens = objective.block_size, objective.sampler, val_tokens
        self.model, self.tokenizer = model, tokenizer
        device = resolve_device("TrainConfig", config.device) if ranks is None else ranks.device
        self._begun = False
        self._memory_note = look_at_memory(model, config, device, self.block_size, ranks)
        super().__init__(
            objective,
            config,
            out,
            source=source,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
            tensorboard=tensorboard,
            log_to=log_to,
            async_save=async_save,
            values=values,
            lock=lock,
            ranks=ranks,
            finished_too=finished_too,
        )

    def train(self) -> TrainResult:
        """As `Loop.train`. A run that was ended early has let go of its folder: it goes on in a Trainer of its own.

        Raises:
            RuntimeError: the loss is not finite, or the run was ended early before.  OSError: a file cannot be written.
        """
        if self._begun and not self._has_ended():
            raise RuntimeError(
                f"Trainer: the run was ended at step {self.state.step}; continue it with a new Trainer, whose model and `resume` are "
                f"those of {self.out / 'last'}"
            )
        self._begun = True
        if self._memory_note:
            self.progress.note(f"memory   {self._memory_note}")
        return super().train()


def _check_kinds(model: Any, config: Any, resume: Any) -> None:
    """Raise TypeError for arguments that are something else, such as `resume` of the command line."""
    kinds = {
        "model": (model, (GPT, BERT), "a GPT or a BERT"),
        "config": (config, TrainConfig, "a TrainConfig"),
        "resume": (resume, (Checkpoint, type(None)), "a Checkpoint, read_checkpoint(RUN/last), or None"),
    }
    for name, (value, kind, expected) in kinds.items():
        if not isinstance(value, kind):
            raise TypeError(f"Trainer: {name} is {value!r:.100}; expected {expected}")
