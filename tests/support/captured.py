"""Generation in steps as they are captured, without a GPU: there they run uncaptured."""

from __future__ import annotations

import gptfast
from gptfast.generation import generate
from gptfast.generation.cuda_graphs import CudaGraphRunner

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [2] * 5, [60, 0, 60]]


class Captured:
    """A model that runs in `CudaGraphRunner`, as a GPT on a GPU does."""

    def __init__(self, model: gptfast.GPT) -> None:
        self.model, self.config = model, model.config
        self.runners: list[CudaGraphRunner] = []

    def runner(self, max_slots: int, max_len: int) -> CudaGraphRunner:
        self.runners.append(CudaGraphRunner(self.model, max_slots, max_len))
        return self.runners[-1]


def captured_tokens(model: gptfast.GPT, prompts: list[list[int]], **options) -> list[list[int]]:
    return generate(Captured(model), prompts, **options)
