"""Workers in this environment: ours, transformers, CTranslate2.

    torch_worker.py gptfast FORMAT FOLDER | transformers DTYPE FOLDER | ctranslate2 TYPE FOLDER THREADS

What is timed of ours and of theirs is the public call from Python: `generate`, greedy; of `decode`, one call for
1 + TOKENS new tokens less one for 1, so that the prompt and the call itself cancel.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from worker import KNOWN, prompt, seconds, serve


class Generating:
    """A program that is called once for a whole text: `_generate` returns the seconds of a call."""

    def _generate(self, prompts: list[list[int]], n: int, beams: int = 1) -> float:
        raise NotImplementedError

    def decode(self, rows: int, tokens: int) -> float:
        prompts = [prompt(n) for n in range(rows)]
        return self._generate(prompts, 1 + tokens) - self._generate(prompts, 1)

    def prefill(self, tokens: int) -> float:
        return self._generate([prompt(0, tokens)], 1)

    def beams(self, count: int, tokens: int) -> float:
        return self._generate([prompt(0)], tokens, count)


class Ours(Generating):
    def __init__(self, dtype: str, folder: str) -> None:
        import gptfast

        self.compiled = gptfast.GPT.from_pretrained(folder).eval().compile_for_inference(dtype)
        self.about = {"version": gptfast.__version__, "weights_mb": self.compiled.nbytes / 1e6}

    def _generate(self, prompts: list[list[int]], n: int, beams: int = 1) -> float:
        options: dict[str, Any] = {"max_new_tokens": n, "temperature": 0.0, "eos_token_id": None}
        options |= {"num_beams": beams} if beams > 1 else {}
        return seconds(lambda: self.compiled.generate(prompts, **options))

    def logits(self, tokens: int) -> list[float]:
        return self.compiled.logits(prompt(0, tokens))[-1, :KNOWN].tolist()

    def read(self) -> dict[str, float]:
        """By a loop that does nothing else on the same threads."""
        rate = self.compiled._core.read_rate(4)
        return {"seconds": self.compiled.nbytes / rate, "bytes": self.compiled.nbytes}


class Transformers(Generating):
    def __init__(self, dtype: str, folder: str) -> None:
        import transformers

        self.model = transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()
        self.about = {"version": transformers.__version__}

    def _generate(self, prompts: list[list[int]], n: int, beams: int = 1) -> float:
        ids = torch.tensor(prompts)
        options: dict[str, Any] = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        options |= {"num_beams": beams} if beams > 1 else {}
        return seconds(lambda: self.model.generate(ids, **options))

    @torch.inference_mode()
    def prefill(self, tokens: int) -> float:
        ids = torch.tensor([prompt(0, tokens)])
        return seconds(lambda: self.model(ids, logits_to_keep=1))

    @torch.inference_mode()
    def logits(self, tokens: int) -> list[float]:
        return self.model(torch.tensor([prompt(0, tokens)])).logits[0, -1, :KNOWN].tolist()


class CTranslate2(Generating):
    def __init__(self, compute_type: str, folder: str, threads: str) -> None:
        import ctranslate2

        self.generator = ctranslate2.Generator(
            folder, device="cpu", compute_type=compute_type, intra_threads=int(threads), inter_threads=1
        )
        self.about = {"version": ctranslate2.__version__}

    def _generate(self, prompts: list[list[int]], n: int, beams: int = 1) -> float:
        texts = [[f"t{i}" for i in ids] for ids in prompts]
        options = {"max_length": n, "min_length": n, "include_prompt_in_result": False, "sampling_topk": 1}
        options["beam_size"] = beams
        return seconds(lambda: self.generator.generate_batch(texts, **options))

    def logits(self, tokens: int) -> list[float]:
        import numpy as np

        logits = self.generator.forward_batch([[f"t{i}" for i in prompt(0, tokens)]])
        return np.array(logits)[0, -1, :KNOWN].tolist()


if __name__ == "__main__":
    runners = {"gptfast": Ours, "transformers": Transformers, "ctranslate2": CTranslate2}
    serve(lambda: runners[sys.argv[1]](*sys.argv[2:]))
