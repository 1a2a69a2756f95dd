"""A program that is asked for the logits of each step by itself: the loop around it, with numpy alone."""

from __future__ import annotations

import numpy as np
from worker import KNOWN, PROMPT, prompt, seconds


class Stepping:
    """`_step` runs the program; `_begin` makes it forget what was before."""

    def _begin(self) -> None:
        """Nothing, where the position says it."""

    def _step(self, ids: np.ndarray, position: int) -> np.ndarray:
        """(B, V) logits behind ids (B, T), which stand from this position on."""
        raise NotImplementedError

    def decode(self, rows: int, tokens: int) -> float:
        self._begin()
        logits = self._step(np.array([prompt(n) for n in range(rows)]), 0)

        def steps() -> None:
            last = logits.argmax(-1)
            for i in range(tokens):
                last = self._step(last[:, None], PROMPT + i).argmax(-1)

        return seconds(steps)

    def prefill(self, tokens: int) -> float:
        self._begin()
        return seconds(lambda: self._step(np.array([prompt(0, tokens)]), 0).argmax(-1))

    def logits(self, tokens: int) -> list[float]:
        self._begin()
        return self._step(np.array([prompt(0, tokens)]), 0)[0, :KNOWN].tolist()
