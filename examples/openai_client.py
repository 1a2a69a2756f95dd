"""Serve a model with `gptfast serve` and call it with the openai client: a streamed completion, its probabilities, a chat.

    pip install 'gptfast-kernels[serve]' openai
    python examples/openai_client.py runs/bard/best

Against a server that runs already the part behind `with serving(…)` is all that is needed.
"""

from __future__ import annotations

import argparse
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import openai


@contextmanager
def serving(model: str, port: int) -> Iterator[openai.OpenAI]:
    """A client of a server that runs meanwhile."""
    command = [sys.executable, "-m", "gptfast", "serve", "--model", model, "--name", "mine", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # its log
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="unused")
    try:
        while True:
            try:
                print("the server has", [card.id for card in client.models.list()])
                break
            except openai.APIConnectionError:
                if server.poll() is not None:
                    raise SystemExit("the server has ended; run gptfast serve by itself to see why") from None
                time.sleep(0.2)
        yield client
    finally:
        server.terminate()
        server.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or a hub id")
    parser.add_argument("--prompt", default="To be")
    parser.add_argument("--tokens", type=int, default=40)
    options = parser.parse_args()
    with serving(options.model, free_port()) as client:
        print("\n---- a completion, as it is written")
        asked = {"model": "mine", "prompt": options.prompt, "max_tokens": options.tokens, "temperature": 0.8, "seed": 0}
        print(options.prompt, end="")
        for chunk in client.completions.create(**asked, stream=True):
            print(chunk.choices[0].text, end="", flush=True)

        print("\n\n---- the next token, and how likely the model finds it")
        found = client.completions.create(model="mine", prompt=options.prompt, max_tokens=1, temperature=0, logprobs=5)
        for token, logprob in found.choices[0].logprobs.top_logprobs[0].items():
            print(f"{token!r:>12} {math.exp(logprob):6.1%}")

        print("\n---- a chat")
        messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": options.prompt}]
        reply = client.chat.completions.create(
            model="mine", messages=messages, max_completion_tokens=options.tokens, seed=0
        )
        print(reply.choices[0].message.content)
        print(f"\n{reply.usage.prompt_tokens} + {reply.usage.completion_tokens} tokens")


if __name__ == "__main__":
    main()
