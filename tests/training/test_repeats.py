"""Training repeats: one command gives the same bits again, busy machine or not, and a resumed run keeps its arithmetic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptfast import machine
from gptfast.models import GPT, GPTConfig
from gptfast.nn.mlp import MLP
from gptfast.ops import gemm
from gptfast.training import TrainConfig, Trainer, read_checkpoint
from tests.support.training import make_trainer, timeless

TEXT = "Is this a dagger which I see before me,\nThe handle toward my hand? Come, let me clutch thee.\n" * 40
OPTIONS = [
    *("--n-layer", "2", "--n-head", "2", "--n-embd", "64", "--block-size", "32", "--batch-size", "8"),
    *("--dropout", "0.1", "--max-steps", "8", "--eval-every", "4", "--eval-batches", "2", "--log-every", "1"),
    *("--optimizer", "muon", "--device", "cpu", "--threads", "2"),  # AdamW too, for the embeddings and vectors
]
# A clock by which now this, now that is the fastest: what a busy machine does to a real one.
ERRATIC = """
import random, sys, time
draw, now = random.Random(int(sys.argv.pop(1))), [0.0]
def erratic():
    now[0] += 0.01 * draw.random() ** 4
    return now[0]
time.perf_counter = erratic
from gptfast.__main__ import main
main()
"""


@contextmanager
def training(text: Path, out: Path, clock: int) -> Iterator[None]:
    """The command, as a user calls it, in a process with its own erratic clock; it has to end well with the `with`."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GPTFAST_GEMM", "OMP_NUM_THREADS")}
    arguments = ["train", "--data", str(text), "--out", str(out), *OPTIONS]
    command = [sys.executable, "-c", ERRATIC, str(clock), *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        printed, _ = process.communicate(timeout=300)
        assert process.returncode == 0, printed
    finally:
        process.kill()
        process.wait()


@contextmanager
def busy_loop() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def losses(out: Path) -> list[dict]:
    return timeless(out)


def files(out: Path) -> dict[str, bytes]:
    """Of both checkpoints, but for trainer.json, which holds times."""
    return {
        f"{name}/{file.name}": file.read_bytes()
        for name in ("last", "best")
        for file in sorted((out / name).iterdir())
        if file.is_file() and file.name != "trainer.json"
    }


@pytest.mark.slow
def test_a_command_gives_the_same_bits_again(tmp_path):
    """Alone, then two at once while a busy loop runs."""
    text = tmp_path / "dagger.txt"
    text.write_text(TEXT)
    first, *others = (tmp_path / name for name in ("first", "second", "third"))
    with training(text, first, 1):
        pass
    with busy_loop(), training(text, others[0], 2), training(text, others[1], 3):
        pass
    assert {"last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors"} <= files(first).keys()
    for other in others:
        assert losses(other) == losses(first)
        assert files(other) == files(first)
        a, b = (read_checkpoint(out / "last") for out in (first, other))
        assert (a.config, a.gemm, a.threads) == (b.config, b.gemm, b.threads)


# ---- the Trainer ----------------------------------------------------------------------------------------------------

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=50, dropout=0.1)
QUICK = TrainConfig(batch_size=4, max_steps=5, eval_every=3, eval_batches=2, dtype="float32", device="cpu")
TOKENS = np.random.default_rng(0).integers(0, 50, 1200).astype(np.uint16)
LAYOUTS = ("nn", "nt", "tn", "tt", "groups")


def trainer(out: Path, config: TrainConfig = QUICK, shape: GPTConfig = SHAPE) -> Trainer:
    torch.manual_seed(3)
    return Trainer(GPT(shape), TOKENS[:1000], TOKENS[1000:], config, out, progress=False)


def resumed(out: Path, config: TrainConfig = QUICK) -> Trainer:
    model = GPT.from_pretrained(out / "last")
    checkpoint = read_checkpoint(out / "last")
    return Trainer(model, TOKENS[:1000], TOKENS[1000:], config, out, progress=False, resume=checkpoint)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The way of every product, in their order; GPTFAST_GEMM is not set."""
    monkeypatch.setattr(gemm, "_FORCED", "")
    ways, chosen = [], gemm.implementation_for
    monkeypatch.setattr(gemm, "implementation_for", lambda *product: ways.append(chosen(*product)) or ways[-1])
    return ways


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_does_not_depend_on_the_number_of_threads(tmp_path, threads, dtype):
    """With our own products, and matrices of which several threads get a part in every op, AdamW's and the norm's too."""
    shape = SHAPE.replace(n_embd=192, n_layer=1, block_size=64)
    config = QUICK.replace(batch_size=8, max_steps=2, eval_every=2, log_every=1, dtype=dtype)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        trainer(tmp_path / str(count), config, shape).train()
    for count in (2, 3):
        assert losses(tmp_path / str(count)) == losses(tmp_path / "1")
        assert files(tmp_path / str(count)) == files(tmp_path / "1")


def test_a_resumed_run_multiplies_as_before(tmp_path, asked):
    """Also one of a gptfast that measured, and in a process that has done other things."""
    measured = {"nt float32": "onednn", "tn float32": "torch"}
    for name, steps in (("whole", 5), ("parts", 3)):
        run = trainer(tmp_path / name, QUICK.replace(max_steps=steps, lr_decay_steps=5))
        run._methods = measured
        run.train()
    before = read_checkpoint(tmp_path / "parts" / "last").gemm
    assert before == {"nn float32": "own", "tt float32": "own", "groups float32": "own", **measured}
    asked.clear()
    resumed(tmp_path / "parts", QUICK.replace(lr_decay_steps=5)).train()
    assert set(asked) == {"own", "onednn", "torch"}
    assert read_checkpoint(tmp_path / "parts" / "last").gemm == before
    whole, parts = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole | parts)
    asked.clear()
    trainer(tmp_path / "new").train()
    assert set(asked) == {"own"}, "a run that was resumed does not decide of the next one in its process"


def test_a_forced_way_to_multiply_is_recorded_and_kept(tmp_path, asked, monkeypatch):
    forced = {f"{layout} float32": "torch" for layout in LAYOUTS}
    monkeypatch.setattr(gemm, "_FORCED", "torch")
    trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    assert read_checkpoint(tmp_path / "last").gemm == forced
    monkeypatch.setattr(gemm, "_FORCED", "")
    asked.clear()
    resumed(tmp_path).train()
    assert set(asked) == {"torch"}
    assert read_checkpoint(tmp_path / "last").gemm == forced


def test_an_unknown_way_in_a_checkpoint_is_named(tmp_path):
    trainer(tmp_path, QUICK.replace(max_steps=3)).train()
    checkpoint = read_checkpoint(tmp_path / "last")
    checkpoint.gemm["nt float32"] = "blas"
    model = GPT.from_pretrained(tmp_path / "last")
    with pytest.raises(ValueError, match="implementation of nt float32 is 'blas'; expected one of own, torch, onednn"):
        Trainer(model, TOKENS[:1000], TOKENS[1000:], QUICK, tmp_path, progress=False, resume=checkpoint)


@pytest.mark.parametrize(
    ("amx", "kernels", "pairs", "expected"),
    [
        (True, "avx512_bf16", True, ("bfloat16", "this CPU has AMX")),
        (False, "amx", True, ("bfloat16", "this CPU has AMX")),  # torch does not use it
        (False, "avx512_bf16", True, ("bfloat16", "this CPU has AVX-512 BF16")),
        (False, "neon_bf16", False, ("bfloat16", "this CPU has Arm's BF16")),
        (False, "neon_dotprod", False, ("float32", "no fast bfloat16 here")),
        (False, "avx2", True, ("float32", "no fast bfloat16 here")),  # GPTFAST_CPU_ISA=avx2
        (False, None, True, ("bfloat16", "this CPU has AVX-512 BF16")),  # without compiled ops
        (False, None, False, ("float32", "no fast bfloat16 here")),
    ],
)
def test_the_dtype_follows_from_the_instructions_and_from_no_clock(amx, kernels, pairs, expected, monkeypatch):
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("timed"))
    monkeypatch.setattr(machine, "has_amx", lambda: amx)
    monkeypatch.setattr(machine, "has_cpu_ops", kernels is not None)
    monkeypatch.setattr(machine, "cpu_isa", lambda: kernels)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: pairs)
    assert machine.choose_dtype("cpu") == expected


def test_blocks_that_are_computed_again_give_the_same_bits(tmp_path: Path, monkeypatch):
    calls, forward = [0, 0], MLP.forward

    def counted(self, *args, **options):
        calls[-1] += self.training
        return forward(self, *args, **options)

    monkeypatch.setattr(MLP, "forward", counted)
    for n, again in enumerate((True, False)):
        calls.append(0)
        make_trainer(tmp_path / str(n), QUICK.replace(recompute=again, max_steps=4)).train()
    assert calls[2] == 2 * calls[3] > 0
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(tmp_path / run / "last" / file) for run in "01")
        assert all(a[name].equal(b[name]) for name in a)
