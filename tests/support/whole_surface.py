"""Everything that a model can be asked for, under another default dtype or device of torch: the answers are the same.

Run as a script, in a process that may crash: `python -m tests.support.whole_surface FOLDER DTYPE|DEVICE …`. It names each step before it
takes it, and writes a line `FAULT …` for each answer that another default changes.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gptfast
from gptfast import GPT, GPTConfig, ops
from gptfast.generation import GenerationConfig, score, stream
from gptfast.generation.scheduler import Request, Scheduler
from gptfast.training import TrainConfig, Trainer
from gptfast.training.optim import build_optimizers
from tests.support.schedulers import run

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 131, "block_size": 48, "dropout": 0.1}
FORMATS = ("float32", "bfloat16", "int8", "nf4")
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
NEW = 6


def model_of(seed: int = 0, **changes: Any) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**SHAPE, **changes})).eval()


def random(*shape: int) -> Tensor:
    return torch.linspace(-2, 2, int(np.prod(shape)), dtype=torch.float32, device="cpu").sin().view(shape)


class Streamer:
    def __init__(self) -> None:
        self.got: list[Tensor] = []

    def put(self, tokens: Tensor) -> None:
        self.got.append(tokens)

    def end(self) -> None:
        pass


def generations(model: Any, assistant: GPT) -> dict[str, Callable[[], Any]]:
    def streamed() -> Any:
        streamer = Streamer()
        return model.generate(PROMPTS[:1], max_new_tokens=NEW, seed=2, streamer=streamer), streamer.got

    def scheduled() -> Any:
        running = Scheduler(model, max_rows=4, max_len=40)
        config = GenerationConfig(max_new_tokens=NEW, seed=5, num_return_sequences=2)
        requests = [Request(prompt, config, logprobs=True, top=3) for prompt in PROMPTS]
        for request in requests:
            running.submit_request(request)
        run(running)
        return [row.new for request in requests for row in request.sequences]

    def with_options(**options: Any) -> Callable[[], Any]:
        return lambda: model.generate(PROMPTS, max_new_tokens=NEW, **options)

    ids = torch.tensor([[1, 2, 3]], dtype=torch.int64, device="cpu")
    return {
        "greedy": with_options(temperature=0.0),
        "drawn": with_options(seed=3, top_k=20, top_p=0.9),
        "several": with_options(seed=3, num_return_sequences=3),
        "beams": with_options(num_beams=3, do_sample=False),
        "drawn beams": with_options(num_beams=3, do_sample=True, seed=4),
        "diverse beams": with_options(num_beams=4, num_beam_groups=2, diversity_penalty=0.5, do_sample=False),
        "processors": with_options(
            seed=1, repetition_penalty=1.3, no_repeat_ngram_size=2, logit_bias={7: 2.0}, min_p=0.01
        ),
        "assistant": with_options(seed=3, assistant_model=assistant),
        "lookup": with_options(seed=3, prompt_lookup_num_tokens=3),
        "slide": lambda: model.generate(PROMPTS[:1], max_new_tokens=60, overflow="slide", seed=3),
        "tensor": lambda: model.generate(ids, max_new_tokens=NEW, seed=3),
        "streamer": streamed,
        "stream": lambda: [step.tokens for step in stream(model, PROMPTS[:1], max_new_tokens=NEW, seed=2)],
        "score": lambda: score(model, PROMPTS[1]),
        "scheduler": scheduled,
    }


def functions() -> dict[str, Callable[[], Any]]:
    x, w, b = random(6, 40).requires_grad_(), random(40).add(2).requires_grad_(), random(40).requires_grad_()
    q, k, v = (random(2, 2, 5, 16).roll(n, 2).requires_grad_() for n in range(3))
    table, targets = random(50, 40).requires_grad_(), torch.arange(6, device="cpu")

    def graded(call: Callable[[], Any], *inputs: Tensor) -> Callable[[], Any]:
        def run() -> Any:
            result = call()
            first = result[0] if isinstance(result, tuple) else result
            return result, torch.autograd.grad(first.double().square().sum(), inputs)

        return run

    def quantized() -> Any:
        codes, scales = ops.quantize_groups(table.detach(), "int4", group_size=32)
        nf4 = ops.quantize_nf4(table.detach(), block_size=64, double=True)
        return codes, scales, ops.quantized_linear(x, codes, scales, format="int4", group_size=32), nf4

    draws = {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "seed": 3}
    return {
        "layer_norm": graded(lambda: ops.layer_norm(x, w, b), x, w, b),
        "add_layer_norm": graded(lambda: ops.add_layer_norm(x, x.roll(1, 0), w, b, dropout_p=0.2, seed=1), x, w, b),
        "rms_norm": graded(lambda: ops.rms_norm(x, w), x, w),
        "add_rms_norm": graded(lambda: ops.add_rms_norm(x, x.roll(1, 0), w, dropout_p=0.2, seed=1), x, w),
        "rotary": graded(lambda: ops.rotary(q, *ops.rotary_tables(5, 16, device="cpu")), q),
        "swiglu": graded(lambda: ops.swiglu(x, x.roll(1, 0), alpha=1.702, limit=1.0), x),
        "relu_squared": graded(lambda: ops.relu_squared(x), x),
        "gelu": graded(lambda: ops.gelu(x, b), x, b),
        "dropout": graded(lambda: ops.dropout(x, 0.4, seed=3, offset=1), x),
        "dropout_mask": lambda: ops.dropout_mask((2, 3, 5), 0.4, seed=3),
        "linear": graded(lambda: ops.linear(x, table), x, table),
        "embedding": graded(lambda: ops.embedding(targets, table, table.roll(1, 0)), table),
        "cross_entropy": graded(lambda: ops.cross_entropy(x, targets, label_smoothing=0.1), x),
        "linear_cross_entropy": graded(lambda: ops.linear_cross_entropy(x, table, targets), x, table),
        "linear_logprobs": graded(lambda: ops.linear_logprobs(x, table, targets), x, table),
        "attention": graded(lambda: ops.causal_attention(q, k, v, dropout_p=0.2, seed=1, window=3), q, k, v),
        "packed": graded(
            lambda: ops.causal_attention(
                q[:1], k[:1], v[:1], cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int64, device="cpu")
            ),
            *(q, k, v),
        ),
        "sample": lambda: (ops.sample(x.detach(), **draws), ops.sample(x.detach(), position=4, stream=2, **draws)),
        "sample_rows": lambda: ops.sample_rows(
            x.detach(), torch.tensor([ops.row_options(**draws)] * 6, device=x.device)
        ),
        "quantized": quantized,
    }


def training(folder: Path) -> dict[str, Callable[[], Any]]:
    ids = torch.tensor(PROMPTS[1][:4], dtype=torch.int64, device="cpu").repeat(2, 2)

    def step(optimizer: str) -> Callable[[], Any]:
        model = stepped[optimizer].train()

        def run() -> Any:
            optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer))
            _, loss = model(ids, ids)
            loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            for one in optimizers:
                one.step()
            return loss.detach(), gradients, list(model.parameters())

        return run

    def trained() -> Any:
        tokens = np.arange(500, dtype=np.uint16) % 131
        config = TrainConfig(max_steps=3, batch_size=2, eval_every=2, checkpoint_every=2, dtype="float32", device="cpu")
        out = folder / "run"
        Trainer(whole, tokens, tokens, config, out, progress=False, overwrite=True).train()
        return list(whole.parameters()), list(GPT.from_pretrained(out / "last").parameters())

    stepped, whole = {name: model_of(3) for name in ("adamw", "muon")}, model_of(4)
    return {"step adamw": step("adamw"), "step muon": step("muon"), "trainer": trained}


def surface(folder: Path) -> dict[str, Callable[[], Any]]:
    """What is asked for, by name. Models and inputs are made here, under torch's own defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    model, assistant, gpt1 = model_of(), model_of(1), model_of(norm_position="post", position_embedding="sinusoidal")
    ids = torch.tensor([PROMPTS[1], PROMPTS[1][::-1]], dtype=torch.int64, device="cpu")
    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: model(ids),
        "forward gpt1": lambda: gpt1(ids),
        "loss": lambda: model(ids, ids),
        **{f"generate {name}": call for name, call in generations(model, assistant).items()},
        **functions(),
        **training(folder),
    }
    with gptfast.backend("eager"):
        eager = generations(model, assistant)

    def in_eager(call: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with gptfast.backend("eager"):
                return call()

        return run

    calls |= {f"eager {name}": in_eager(call) for name, call in {**eager, **functions()}.items()}

    def packed(format: str, saved: Path) -> Any:
        compiled = model.compile_for_inference(format)
        compiled.save(saved)
        again = gptfast.engine.load(saved, verify=True)
        return compiled.logits(PROMPTS[0]), again.logits(ids), again.generate(PROMPTS, max_new_tokens=NEW, seed=1)

    def checkpoint(which: GPT, name: str) -> Any:
        which.save_pretrained(folder / name)
        again = GPT.from_pretrained(folder / name)
        half = GPT.from_pretrained(folder / name, dtype=torch.bfloat16)
        return (
            again(ids),
            list(again.state_dict().values()),
            half(ids),
            again.generate(PROMPTS, max_new_tokens=NEW, seed=1),
        )

    for format in FORMATS:
        calls[f"packed {format}"] = lambda format=format: packed(format, folder / f"{format}.gptfast")
    compiled = model.compile_for_inference("int8")
    calls |= {f"compiled {name}": call for name, call in generations(compiled, assistant).items()}
    calls |= {"checkpoint": lambda: checkpoint(model, "ck"), "checkpoint gpt1": lambda: checkpoint(gpt1, "ck1")}
    return calls


def new_models(dtype: torch.dtype, device: str) -> None:
    """A model made under a default follows it, as torch's modules do, and works where the device does."""
    for changes in ({}, {"norm_position": "post", "position_embedding": "sinusoidal"}):
        model = model_of(**changes)
        for name, x in [*model.named_parameters(), *model.named_buffers()]:
            assert (x.dtype, x.device.type) == (dtype, device), (name, x.dtype, x.device)
        if device == "cpu":
            ids = torch.tensor([PROMPTS[0]], dtype=torch.int64)
            loss = model.train()(ids, ids)[1]
            loss.backward()
            assert loss.isfinite() and model.wte.weight.grad.dtype == dtype
            assert len(model.generate(PROMPTS, max_new_tokens=2, seed=0)[0]) == 5


def flat(result: Any) -> list[Any]:
    """Tensors and plain values of any nesting, in order."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return flat([getattr(result, field.name) for field in dataclasses.fields(result)])
    if isinstance(result, (list, tuple)):
        return [part for item in result for part in flat(item)]
    return [result.detach().clone() if isinstance(result, Tensor) else result]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return (a.dtype, a.device, a.shape) == (b.dtype, b.device, b.shape) and torch.equal(a, b)
    return type(a) is type(b) and a == b


def main(defaults: list[str], folder: Path) -> None:
    plain = {name: flat(call()) for name, call in surface(folder / "plain").items()}
    for default in defaults:
        calls = surface(folder / default)  # anew: training changes its model
        dtype, device = getattr(torch, default, torch.float32), default if default == "meta" else "cpu"
        torch.set_default_dtype(dtype)
        torch.set_default_device(device if device == "meta" else None)
        for name, call in calls.items():
            print(default, name, flush=True)
            got = flat(call())
            if len(got) != len(plain[name]) or not all(map(same, got, plain[name])):
                print(f"FAULT {default}, {name}", flush=True)
        print(default, "new models", flush=True)
        new_models(dtype, device)
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[2:], Path(sys.argv[1]))
