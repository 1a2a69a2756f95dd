"""gptfast's attention in a Llama of transformers, beside eager attention.

python examples/llama_attention.py [--length 512]
"""

from __future__ import annotations

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import gptfast  # noqa: F401 (makes the name known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=given.length,
    )
    torch.manual_seed(0)
    models = {name: AutoModelForCausalLM.from_config(config, attn_implementation=name) for name in ("eager", "gptfast")}
    models["gptfast"].load_state_dict(models["eager"].state_dict())
    ids = torch.randint(1000, (1, given.length))
    losses = {}
    for name, model in models.items():
        model(ids, labels=ids).loss.backward()
        begin = time.perf_counter()
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses[name] = loss.item()
        print(f"{name}: loss {losses[name]:.6f}, {time.perf_counter() - begin:.3f} s a step")
    assert abs(losses["gptfast"] - losses["eager"]) < 1e-4


if __name__ == "__main__":
    main()
