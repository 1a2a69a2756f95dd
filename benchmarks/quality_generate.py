"""What each format of the engine costs in quality: perplexity and agreement with fp32, on text that the model never saw.

    gptfast train --data shakespeare … --out runs/bard
    python benchmarks/quality_generate.py --model runs/bard/best --data runs/bard/data [--windows 64] [--llama-bin BIN]

Per format: bits a weight, perplexity of the validation text, how often its most likely token is that of fp32, the mean
Kullback-Leibler divergence from fp32, and the relative L2 error of the logits. llama.cpp's formats stand beside ours where
llama_decode (peers/build_llama.sh) and the package gguf are there and the shapes fit them.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from generate_peers import LLAMA_FILE_TYPES, Process, Programs
from torch import Tensor

from gptfast import GPT
from gptfast.data.prepared import load_prepared
from gptfast.engine import FORMATS

Logits = Callable[[list[int]], Tensor]


@dataclass
class Quality:
    """Sums over positions, of one model beside the reference."""

    nats: float = 0.0
    agreed: int = 0
    divergence: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    count: int = 0

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        logprobs, expected = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
        self.nats -= logprobs.gather(-1, targets[:, None]).sum().item()
        self.agreed += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.divergence += (expected.exp() * (expected - logprobs)).sum().item()
        self.error += (logits.double() - reference.double()).square().sum().item()
        self.norm += reference.double().square().sum().item()
        self.count += len(targets)

    def line(self) -> str:
        return (
            f"{math.exp(self.nats / self.count):>12.4f}{100 * self.agreed / self.count:>10.2f} %"
            f"{self.divergence / self.count:>12.2e}{math.sqrt(self.error / self.norm):>12.2e}"
        )


def logits_of(worker: Process, ids: list[int], folder: Path) -> Tensor:
    """(T, V), from llama.cpp."""
    path = folder / "logits"
    worker.ask("write", path, *ids)
    return torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(len(ids), -1)


def contenders(model: GPT, folder: Path, llama: Path | None) -> dict[str, Logits]:
    """Ours in every format, and llama.cpp's."""
    found: dict[str, Logits] = {f"gptfast {dtype}": model.compile_for_inference(dtype).logits for dtype in FORMATS}
    programs = Programs(folder, torch.get_num_threads(), llama)
    model.save_pretrained(programs.model)
    for name in LLAMA_FILE_TYPES if llama else ():
        if name == "q4_K_M" and model.config.n_embd % 256:
            print(f"llama.cpp q4_K_M is left out: n_embd = {model.config.n_embd} is no multiple of its 256")
            continue
        worker = Process(name, programs.command(f"llama.cpp {name}"), programs.threads)
        found[f"llama.cpp {name}"] = lambda ids, worker=worker: logits_of(worker, ids, folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="folder that gptfast train or prepare made")
    parser.add_argument("--windows", type=int, default=64, help="stretches of block_size tokens, spread over the text")
    parser.add_argument("--llama-bin", type=Path, help="llama_decode, built with llama.cpp")
    options = parser.parse_args()
    model = GPT.from_pretrained(options.model).eval()
    tokens, T = load_prepared(options.data).val, model.config.block_size
    starts = torch.linspace(0, len(tokens) - T - 1, options.windows).long().tolist()
    with tempfile.TemporaryDirectory() as folder:
        models = contenders(model, Path(folder), options.llama_bin)
        qualities = {name: Quality() for name in models}
        for start in starts:
            window = torch.tensor(tokens.tokens[start : start + T + 1].astype("int64"))
            ids, targets = window[:-1].tolist(), window[1:]
            with torch.no_grad():
                reference = model(window[None, :-1])[0]
            for name, logits in models.items():
                qualities[name].add(logits(ids), reference, targets)
    print(f"{options.windows * T} tokens of validation text, {model.num_parameters():,} parameters")
    print(f"{'':<22}{'perplexity':>12}{'top-1':>12}{'KL':>12}{'logits':>12}")
    for name, quality in qualities.items():
        print(f"{name:<22}{quality.line()}")


if __name__ == "__main__":
    main()
