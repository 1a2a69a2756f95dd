"""Bodies that clients send to gptfast serve: whatever they hold, the answer is a completion or says what is wrong with them."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import torch
from starlette.testclient import TestClient

from gptfast import GPT, GPTConfig
from gptfast.serving.app import Limits, create_app
from gptfast.tokenizer import CharTokenizer

from . import mutate, runner

TEXTS = ["To be", "or not", "e"]
ASKED: dict[str, list[Any]] = {  # values that are right, for each field
    "prompt": [*TEXTS, TEXTS, [1, 2, 3], [[1], [2, 3]], [3] * 24, ""],
    "max_tokens": [0, 1, 5, 23, None],
    "temperature": [0, 0.5, 2.0, None],
    "top_p": [0.5, 1.0],
    "n": [1, 3],
    "best_of": [1, 3],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}, None],
    "logprobs": [0, 5, 20],
    "echo": [True, False],
    "stop": ["e", ["a", "be"], []],
    "seed": [0, -5, 2**64 - 1],
    "logit_bias": [{"3": 100}, {"1": -100, "2": 0.5}, {}],
    "presence_penalty": [0, 2, -2],
    "frequency_penalty": [0.5],
    "suffix": [None, ""],
    "user": ["somebody"],
    "top_k": [0, 5],
    "min_p": [0.1],
    "repetition_penalty": [1.2],
}
USER, BOT, SYSTEM = ({"role": role, "content": "To be"} for role in ("user", "assistant", "system"))
CHATS: dict[str, list[Any]] = {  # of chats, beside those that both have
    **{
        name: values
        for name, values in ASKED.items()
        if name not in ("prompt", "best_of", "echo", "suffix", "logprobs")
    },
    "messages": [[USER], [SYSTEM, USER], [USER, BOT, USER], [SYSTEM, SYSTEM, {"role": "user", "content": []}]],
    "max_tokens": [1, 5, None],
    "max_completion_tokens": [5],
    "logprobs": [True, False],
    "response_format": [{"type": "text"}, {"type": "json_object"}],
    "tools": [[], None],
}
ENDPOINTS = [("/v1/completions", "prompt", ASKED), ("/v1/chat/completions", "messages", CHATS)]


def run(seconds: float, seed: int = 0) -> runner.Report:
    """Send bodies for about so many seconds."""
    return runner.campaign("server", make, seconds, seed)


def make() -> runner.Case:
    """A case sends one body, right or damaged, to a server in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tokenizer = CharTokenizer.train('To be, or not; System: User: Assistant:\n {}[]"0fl')
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=64, vocab_size=tokenizer.vocab_size, dropout=0.0)
    app = create_app(GPT(config).eval(), tokenizer, "m", Limits(max_rows=4, max_queue=8, seconds=30.0))
    client = TestClient(app, raise_server_exceptions=False)
    client.__enter__()  # starts the worker, which ends with this process

    def case(rng: random.Random) -> tuple[str, str | None]:
        path, needed, values = rng.choice(ENDPOINTS)
        names = [needed, *rng.sample(list(values), rng.randrange(6))]
        body: Any = {"model": "m", **{name: rng.choice(values[name]) for name in names}}
        kind = rng.choice(["right", "values", "values", "values", "bytes"])
        if kind == "values":
            body = mutate.mutate_value(rng, body, rng.choice([1, 1, 2]))
        content = mutate.as_json(rng, body) if kind != "right" else json.dumps(body).encode()
        content = mutate.mutate_bytes(rng, content) if kind == "bytes" else content
        answer = client.post(path, content=content)
        found = wrong(answer.status_code, answer.text)
        if found is None and client.get("/health").json() != {"status": "ok", "sequences": 0}:
            found = f"what is left: {client.get('/health').text}"
        return kind, found and f"{path} {content!r:.500}\n{answer.status_code} {answer.text[:500]}\n{found}"

    return case


def wrong(status: int, text: str) -> str | None:
    """What is wrong with an answer."""
    if status == 200:
        parts = re.findall(r"^data: (.*)$", text, re.M) if text.startswith("data: ") else [text]
        if re.search(r"[:\[,] ?(NaN|-?Infinity)", text):
            return "an answer that is no JSON"
        values = [json.loads(part) for part in parts if part != "[DONE]"]
        return "an answer with an error inside" if any("error" in value for value in values) else None
    if not 400 <= status < 500:
        return f"status {status}"
    error = json.loads(text).get("error", {})
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return "an error of another shape"
    return "the server was busy with one request" if status == 429 else None
