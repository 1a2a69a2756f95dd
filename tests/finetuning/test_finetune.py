"""gptfast finetune: what it writes, resuming to the bit, comparing methods."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptfast import GPT
from gptfast.cli import _finetune
from gptfast.finetuning import TaskModel, finetune, metrics, read_examples, response_mask
from gptfast.finetuning.launch import new_run
from gptfast.finetuning.results import finish
from gptfast.tokenizer import load_tokenizer
from gptfast.training.log import read_log
from tests.support.finetuning import SMALL, base, files, result, write
from tests.support.finetuning import finetune as run
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture
from tests.support.training import timeless

WEIGHTS = {"full": "model.safetensors", **dict.fromkeys(("lora", "qlora", "prompt"), "adapter_model.safetensors")}
TASKS = ["classification", "entailment", "similarity", "choice", "lm", "chat"]
CASES = [(task, method) for task in TASKS for method in ("full", "lora")]
CASES += [(task, "prompt") for task in ("classification", "choice", "lm")]
CASES += [(task, "qlora") for task in ("classification", "chat")]
KEYS = {"metric", "value", "baseline", "trainable_parameters", "truncated"}


def assert_same_run(a: Path, b: Path, method: str) -> None:
    for name in (WEIGHTS[method], "optimizer.safetensors"):
        for checkpoint in ("last", "best"):
            x, y = (load_file(folder / checkpoint / name) for folder in (a, b))
            assert x.keys() == y.keys()
            assert all(torch.equal(x[key], y[key]) for key in x), (checkpoint, name)
    assert timeless(a) == timeless(b)
    found = [json.loads((folder / "metrics.json").read_text()) for folder in (a, b)]
    assert [f["value"] for f in found] == [found[0]["value"]] * 2


def test_a_soft_prompt_learns_chats_without_new_tokens(tmp_path, capsys):
    folder = base(tmp_path / "base", block_size=64)
    chat = [{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}] * 8
    data = write(tmp_path / "chat.jsonl", chat)
    more = ("--data", data, "--eval-data", data, "--num-virtual-tokens", "4")
    assert run(tmp_path, "--method", "prompt", *more, task="chat") == 0, capsys.readouterr().err
    assert "it gets one of plain words, whose replies end with its end token" in capsys.readouterr().out
    tokenizer, found = load_tokenizer(tmp_path / "out" / "best"), result(tmp_path)
    assert tokenizer.vocab_size == load_tokenizer(folder).vocab_size and found["value"] < found["baseline"]
    ids, mask = response_mask(chat[0], tokenizer)
    assert tokenizer.decode(ids) == "User:\nthe cat\n\nAssistant:\nsat<|endoftext|>\n"
    assert [i for i, learnt in zip(ids, mask, strict=True) if learnt][-1] == tokenizer.eos_id


@pytest.mark.parametrize(("task", "method"), CASES)
def test_every_task_by_every_method(tmp_path, capsys, task, method):
    base(tmp_path / "base", n_embd=64 if method == "qlora" else 16)
    assert run(tmp_path, "--method", method, "--show-batch", task=task) == 0, capsys.readouterr().err
    said, found, out = capsys.readouterr().out, result(tmp_path), tmp_path / "out"
    assert found.keys() >= KEYS
    labels = task in ("classification", "entailment", "choice")
    made = {"best", "last", "log.jsonl", "loss.png", "metrics.json", "training.lock", *(["confusion.png"] * labels)}
    assert {f.name for f in out.iterdir()} | {"training.lock"} == made
    assert (out / "best" / WEIGHTS[method]).exists()
    assert (out / "best" / "model.safetensors").exists() is (method == "full"), "adapter methods write no base"
    expected = {"similarity": "pearson", "lm": "perplexity", "chat": "perplexity"}.get(task, "accuracy")
    assert found["metric"] == expected
    assert f"{expected} {found['value']:.3f} on 16 held-out examples" in said
    assert ("confusion.png" in said) is labels
    assert [r["step"] for r in read_log(out / "log.jsonl") if "val_loss" in r] == [0, 2, 4, 6, 8]
    if expected == "perplexity":
        assert found["value"] < found["baseline"]
    if expected != "perplexity":
        packed = {"quantize": "nf4", "double_quant": True} if method == "qlora" else {}
        model = TaskModel.from_pretrained(out / "best", **packed)
        assert model.task == task
        held = read_examples(tmp_path / f"{task}-1.jsonl", task)
        said = model.predict([{k: v for k, v in r.items() if k not in ("label", "score")} for r in held.records])
        name = "score" if task == "similarity" else "label"
        true = [record[name] for record in held.records]
        assert getattr(metrics, expected)(true, [p[name] for p in said]) == pytest.approx(found["value"], abs=1e-6)
    elif method != "full":
        gpt = GPT.from_pretrained(tmp_path / "base")
        gpt.resize_token_embeddings(load_tokenizer(out / "best").vocab_size)
        gpt.load_adapter(out / "best")
    else:
        GPT.from_pretrained(out / "best")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "method"),
    [("classification", "full"), ("choice", "lora"), ("chat", "lora"), ("lm", "prompt"), ("similarity", "qlora")],
)
def test_resuming_is_bit_for_bit(tmp_path, task, method):
    options = ["--method", method, "--checkpoint-every", "1", "--seed", "5"]
    options += ["--lora-dropout", "0.2"] * (method in ("lora", "qlora"))
    base(tmp_path / "base", n_embd=64 if method == "qlora" else 16)
    options += ["--recompute"] * (method == "qlora")
    assert run(tmp_path, *options, task=task, out="whole") == 0
    code = f"import sys; from gptfast.cli import main; sys.argv = {['gptfast', 'finetune']!r} + sys.argv[1:]; main()"
    command = [*files(tmp_path, task), *SMALL, "--batch-size", "4", "--max-steps", "8", "--eval-every", "2"]
    out = tmp_path / "killed"
    command += ["--log-every", "1", "--learning-rate", "1e-2", *options, "--out", out]
    for _ in range(5):  # on a busy machine a run may end before it is looked at
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stdout=subprocess.DEVNULL)
        while process.poll() is None and len(timeless(out) if (out / "log.jsonl").exists() else []) < 5:
            time.sleep(0.005)
        process.kill()
        if process.wait() == -signal.SIGKILL and not (out / "metrics.json").exists():
            break
    assert process.returncode == -signal.SIGKILL and not (out / "metrics.json").exists()
    torch.manual_seed(99)  # nothing may depend on torch's own generator
    assert gptfast("finetune", "--resume", "--out", out) == 0
    assert_same_run(tmp_path / "whole", out, method)


def test_a_complete_run_resumes_to_its_result(tmp_path, capsys):
    assert run(tmp_path) == 0
    before = result(tmp_path)
    (tmp_path / "out" / "metrics.json").unlink()
    assert gptfast("finetune", "--resume", "--out", tmp_path / "out") == 0
    assert result(tmp_path)["value"] == before["value"]
    assert run(tmp_path, "--resume", "--max-steps", "10") == 0  # the whole command again, with more steps
    assert result(tmp_path)["steps"] == 10


def test_the_function_does_what_the_command_does(tmp_path):
    assert run(tmp_path, "--method", "lora", "--lora-r", "2", "--target-modules", "c_attn,mlp.c_fc") == 0
    model, data, held = tmp_path / "base", tmp_path / "classification-0.jsonl", tmp_path / "classification-1.jsonl"
    found = finetune(
        model,
        data,
        "classification",
        "lora",
        tmp_path / "again",
        eval_data=held,
        lora_r=2,
        target_modules="c_attn,mlp.c_fc",
        batch_size=4,
        max_steps=8,
        eval_every=2,
        log_every=1,
        learning_rate=1e-2,
        dtype="float32",
        device="cpu",
        threads=1,
    )
    assert_same_run(tmp_path / "out", tmp_path / "again", "lora")
    # r (in + out) of both matrices in both layers, and the head of two classes
    assert (
        found.trainable_parameters
        == 2 * 2 * ((16 + 48) + (16 + 64)) + 2 * 16
        == result(tmp_path)["trainable_parameters"]
    )


def test_the_result_is_judged_as_predict_does(tmp_path, monkeypatch):
    """In float32, whatever the products of the training: else metrics.json tells of ties that predict does not have."""
    files(tmp_path, "choice")
    given = {"model": str(tmp_path / "base"), "data": str(tmp_path / "choice-0.jsonl"), "task": "choice"}
    run = new_run({**given, "out": tmp_path / "out", "max_steps": 1, "dtype": "bfloat16", "device": "cpu"}, False)
    trained, rounded, forward = run.loop.train(), [], TaskModel.forward

    def watched(self, *args, **given):
        rounded.append(torch.is_autocast_enabled("cpu"))
        return forward(self, *args, **given)

    monkeypatch.setattr(TaskModel, "forward", watched)
    finish(run, trained)
    assert rounded
    assert not any(rounded)


def test_metrics_weights_and_truncation(tmp_path, capsys):
    more = ["--metric", "macro_f1", "--class-weights", "war=3", "--patience", "1", "--dropout", "0"]
    assert run(tmp_path, *more) == 0
    found = result(tmp_path)
    assert found["metric"] == "macro_f1"
    assert found["baseline"] == pytest.approx(metrics.macro_f1([0, 1], [0, 0]))
    assert TaskModel.from_pretrained(tmp_path / "out" / "best").class_weights.tolist() == [1.0, 3.0]
    long = tmp_path / "long.jsonl"
    long.write_text('{"text": "%s", "label": "pet"}\n{"text": "war", "label": "war"}\n' % ("cat " * 60))
    assert run(tmp_path, "--overwrite", "--eval-data", long, "--class-weights", "balanced") == 0
    assert result(tmp_path)["truncated"] == 1
    assert "1 examples are longer than 32 tokens and are cut" in capsys.readouterr().out


@pytest.mark.slow
def test_compare_runs_every_method_and_prints_a_table(tmp_path, capfd):
    base(tmp_path / "base", n_embd=64)
    assert run(tmp_path, "--compare", "--no-double-quant") == 0
    said = capfd.readouterr().out
    table = said[said.index("trained parameters") :]
    assert "base in nf4\n" in said
    for method in ("full", "lora", "qlora", "prompt"):
        found = result(tmp_path / "out", method)
        assert found["peak_memory"] > 0
        assert f"{found['trainable_parameters']:,}" in table
        assert f"{found['value']:.3f}" in table
    assert [r["method"] for r in json.loads((tmp_path / "out" / "compare.json").read_text())] == [
        *("full", "lora", "qlora", "prompt")
    ]


def test_ctrl_c_ends_a_comparison_and_resume_goes_on(tmp_path, capsys, monkeypatch):
    """The method that runs saves and is the last; with --resume those that have begun go on, the others begin."""
    begun: list[list[str]] = []

    def interrupted(arguments: list[str]) -> int:
        begun.append(arguments)
        return 130

    monkeypatch.setattr(_finetune, "_run", interrupted)
    assert run(tmp_path, "--compare") == 130
    assert "the same command with --resume" in capsys.readouterr().err
    assert [a[a.index("--method") + 1] for a in begun] == ["full"]
    monkeypatch.setattr(_finetune, "_run", lambda arguments: begun.append(arguments) or 1)
    (tmp_path / "out" / "full" / "last").mkdir(parents=True)
    (tmp_path / "out" / "full" / "last" / "trainer.json").touch()
    (tmp_path / "out" / "lora" / "last").mkdir(parents=True)  # a first save that a kill ended
    assert run(tmp_path, "--compare", "--resume") == 1
    assert {a[a.index("--method") + 1]: "--resume" in a for a in begun[1:]} == {
        **{"full": True, "lora": False},
        **{"qlora": False, "prompt": False},
    }
