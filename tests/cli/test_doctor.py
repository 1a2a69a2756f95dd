"""`gptfast doctor`: the ops of a model, and problems that are put in, each with its next command."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gptfast import GPTConfig, backend
from gptfast.backend import cpu_isas, force_cpu_isa
from gptfast.benchmarking import self_test as tested
from gptfast.benchmarking.self_test import OpResult, cheap, model_cases, self_test
from gptfast.cli import app
from gptfast.cli._problems import find_problems, usable_cores

SMALL = GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=65, block_size=64)


def problems(waited: float | None = None, results: Any = (), dtype: str = "float32") -> dict[str, str]:
    return {p.problem: p.next for p in find_problems(list(results), dtype, waited)}


def next_of(words: str, found: dict[str, str]) -> str:
    (command,) = [command for problem, command in found.items() if words in problem]
    return command


def test_every_op_of_a_model_is_checked_and_timed():
    results = self_test(SMALL, 2, 64, torch.float32, seconds=20)
    timed = [r for r in results if r.op not in tested.WITHOUT_TEST]
    assert {r.op for r in timed} >= {"layer_norm", "linear", "causal_attention", "linear_cross_entropy", "dropout"}
    for r in timed:
        assert r.wrong is None and 0 <= r.results < 10 and 0 <= r.gradients < 10, r
        assert r.milliseconds > 0 and r.ratio > 0 and r.peer, r
    assert {r.backend for r in results} == {"cpu"} and all("kernels for" in r.reason for r in results)


def test_json_names_the_backend_and_the_reason(monkeypatch):
    monkeypatch.setattr(tested, "_time", lambda *_: None)
    asked = ["doctor", "--json", "--model", "gpt1", "--seq-len", "16", "--dtype", "bfloat16", "--seconds", "0"]
    with backend("eager"):
        said = json.loads(CliRunner().invoke(app, asked).stdout)
    assert said["shape"] == "gpt1, 1 x 16 tokens, bfloat16, on cpu"
    assert {(r["backend"], r["reason"]) for r in said["ops"]} == {("eager", "asked for")}
    assert {"problem": "GPTFAST_BACKEND asks for eager", "next": "unset GPTFAST_BACKEND"} in said["problems"]
    assert "processor" in said["machine"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "doctor: --dtype is 'int8'; expected one of auto, float32, bfloat16, float16"),
        (["--seq-len", "2048"], "doctor: --seq-len is 2048; the context of gpt2 is 1024"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    assert str(CliRunner().invoke(app, ["doctor", *arguments]).exception) == message


def test_a_dtype_without_kernels_and_a_missing_library(monkeypatch):
    name, why = tested.choice("gelu", torch.float64, "cpu")
    assert name == "eager" and "not float64" in why
    monkeypatch.setattr("gptfast.backend.missing_reason", "_ops.so was not built")
    found = problems()
    assert next_of("no compiled ops: _ops.so was not built", found).startswith("pip install")
    monkeypatch.setitem(backend.resolve.__globals__["_ops"], "cpu", set())
    assert tested.choice("gelu", torch.float32, "cpu")[1].startswith("cpu: _ops.so was not built")


@pytest.mark.skipif(len(cpu_isas()) < 2, reason="this machine runs one instruction set")
def test_slower_instructions_than_the_cpu_has(monkeypatch):
    with force_cpu_isa("scalar"):
        assert next_of(f"run on scalar, and this CPU has {cpu_isas()[-1]}", problems()) == "unset GPTFAST_CPU_ISA"
        monkeypatch.setattr("gptfast.backend.cpu_isas", lambda: ["scalar"])
        assert next_of("without vector instructions, and torch finds", problems()).startswith("pip install")


def test_a_busy_machine_and_its_threads(monkeypatch):
    assert next_of("busy: threads waited 40%", problems(waited=0.4)).startswith("top")
    cores = usable_cores()
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores + 3)
    assert next_of(f"{cores + 3} threads on {cores} cores", problems()) == f"export OMP_NUM_THREADS={cores}"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr("gptfast.cli._problems.usable_cores", lambda: 8)
    assert next_of("1 of 8 cores", problems()) == "unset OMP_NUM_THREADS MKL_NUM_THREADS"


def test_malloc_as_installed(monkeypatch):
    monkeypatch.setattr("gptfast.malloc._tuned", False)
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    command = next_of("malloc returns", problems()).split("#")[0].removeprefix("export ")
    for setting in command.split():
        monkeypatch.setenv(*setting.split("="))
    assert not [p for p in problems() if "malloc" in p], "the command mends it"


def test_a_wrong_op_and_a_slow_one(monkeypatch):
    slow = OpResult("gelu", "float32", "cpu", "why", ratio=0.5, peer="F.gelu")
    assert next_of("gelu has 0.50x the speed of F.gelu", problems(0.0, [slow])) == "gptfast bench gelu"
    assert not [p for p in problems(0.4, [slow]) if "speed" in p], "a busy machine says nothing about an op"
    monkeypatch.setattr(
        "gptfast.ops.layer_norm", lambda x, weight, bias: 1.01 * torch.layer_norm(x, x.shape[-1:], weight, bias)
    )
    results = self_test(SMALL, 1, 16, torch.float32, seconds=1)
    assert next_of("layer_norm is wrong on cpu", problems(0.0, results)) == "export GPTFAST_BACKEND=eager"


def test_sizes_are_cut_to_what_is_cheap():
    for case in model_cases(GPTConfig.preset("gpt3-175b"), 8, 2048):
        flops, _ = cheap(case, 2).cost(2)
        small = cheap(case, 2).dims
        assert flops <= 1.01 * tested.MOST_FLOPS or small["N"] == 1
        assert small.get("C") == case.dims.get("C") and small.get("D") == case.dims.get("D")
    results = self_test(SMALL, 1, 16, torch.float32, seconds=0)
    assert all(r.results is None and r.ratio is None and r.reason for r in results)
