"""Generation in steps as they are captured, without a capture."""

from __future__ import annotations

import gptfast
from gptfast.generation import cuda_graphs
from gptfast.generation.config import GenerationConfig
from gptfast.generation.request import Request
from gptfast.generation.stopping import Stopping

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [2] * 5, [60, 0, 60]]


def requests_of(prompts: list[list[int]], **options) -> list[Request]:
    config = GenerationConfig.of(**options)
    return [Request(prompt, config, Stopping(config)) for prompt in prompts]


def graphed_tokens(model: gptfast.GPT, prompts: list[list[int]], **options) -> list[list[int]]:
    requests = requests_of(prompts, **options)
    rows = sum(request.config.num_return_sequences for request in requests)
    cuda_graphs.run(model, requests, cuda_graphs.Decoder(model, rows, model.config.block_size))
    return [row.tokens for request in requests for row in request.rows]
