"""gptfast finetune with bad input: one line that says what to do, and nothing is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.finetuning import finetune
from gptfast.finetuning.methods import attach
from gptfast.finetuning.options import METHODS, MethodOptions, of_method
from gptfast.finetuning.tasks import TASKS
from gptfast.tokenizer import CharTokenizer
from gptfast.training.checksums import TRAINER, own_checksum
from tests.support.finetuning import base, files, records, result, write
from tests.support.finetuning import finetune as run
from tests.support.train_command import _argv, gptfast  # noqa: F401  a fixture

GOOD = records("classification", 8, 0)
LORA = ("lora", "qlora")
BY_METHOD = {
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_dropout", "target_modules"), LORA),
    **dict.fromkeys(("quantize", "double_quant"), ("qlora", "prompt")),
    "num_virtual_tokens": ("prompt",),
    "router_aux_loss_coef": ("full", "lora"),
}
HEADS = ("classification", "entailment", "similarity", "choice")
BY_TASK = {**dict.fromkeys(("metric", "lm_coef"), HEADS), "class_weights": HEADS[:2]}


def failure(capsys: pytest.CaptureFixture[str], folder: Path, *more: str | Path, task: str = "classification") -> str:
    capsys.readouterr()
    assert run(folder, *more, task=task) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert not any("Traceback" in line for line in rest)
    return first


def bad(folder: Path, *lines: dict | str) -> Path:
    path = folder / "bad.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


DATA = {
    "a label that is not in the set": (
        "--eval-data",
        [*GOOD, {"text": "x", "label": "poem"}],
        "line 9: the label 'poem'",
    ),
    "one class": ("--data", GOOD[::2], "all 4 examples have the label 'pet'"),
    "an empty file": ("--data", [], "has no examples"),
    "an empty held-out file": ("--eval-data", [], "has no examples"),
    "malformed": ("--data", [GOOD[0], '{"text": "a", "label"'], "line 2"),
    "a missing field": ("--data", [GOOD[0], {"txt": "a", "label": "pet"}], "line 2: there is no field 'text'"),
    "an empty text": ("--data", [*GOOD, {"text": "", "label": "pet"}], None),
    "no file": ("--data", None, "bad.jsonl"),
}


OUTSIDE = {
    "classification": (
        {"text": "the cat", "label": "a"},
        {"text": "the dog", "label": "b"},
        {"text": "zebra", "label": "a"},
    ),
    "choice": ({"context": "the", "choices": ["cat", "dog"], "label": 0},) * 2
    + ({"context": "the", "choices": ["cat", "zebra"], "label": 0},),
    "lm": ({"text": "the cat"}, {"text": "the dog"}, {"text": "zebra"}),
    "chat": (
        {"prompt": "the", "response": "cat"},
        {"prompt": "a", "response": "dog"},
        {"prompt": "a", "response": "zebra"},
    ),
}


@pytest.mark.parametrize("task", OUTSIDE)
def test_a_text_outside_the_tokenizer_is_named_by_its_line(tmp_path, capsys, task):
    tokenizer = CharTokenizer.train("the cat dog")
    GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=16, vocab_size=tokenizer.vocab_size)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save(tmp_path / "base")
    path, held = bad(tmp_path, *OUTSIDE[task]), write(tmp_path / "held.jsonl", OUTSIDE[task][:2])
    message = failure(capsys, tmp_path, "--data", path, "--eval-data", held, task=task)
    assert f"{path}, line 3: " in message and "'z'" in message
    assert not (tmp_path / "out").exists(), "nothing was made"


@pytest.mark.parametrize("case", DATA)
def test_bad_examples(tmp_path, capsys, case):
    option, lines, said = DATA[case]
    path = tmp_path / "bad.jsonl" if lines is None else bad(tmp_path, *lines)
    if said is None:  # an empty text is one of delimiters
        assert run(tmp_path, option, path) == 0
        return
    message = failure(capsys, tmp_path, option, path)
    assert said in message
    assert str(path) in message
    assert not (tmp_path / "out").exists(), "nothing was made"


def test_a_split_that_would_be_empty(tmp_path, capsys):
    one = bad(tmp_path, GOOD[0], GOOD[1])
    given = [str(x) for x in files(tmp_path)]
    given[given.index("--data") + 1] = str(one)
    at = given.index("--eval-data")
    capsys.readouterr()
    assert gptfast("finetune", *given[:at], *given[at + 2 :], "--out", tmp_path / "out") == 1
    assert "is the only class of its 1 training examples" in capsys.readouterr().err
    single = bad(tmp_path, {"text": "cat"})
    at = given.index("--task")
    command = ["--model", tmp_path / "base", "--data", single, "--task", "lm", "--out", tmp_path / "out"]
    assert gptfast("finetune", *command) == 1
    assert "has 1 example" in (err := capsys.readouterr().err)
    assert "--eval-data" in err


OPTIONS = {
    "modules that do not exist": (["--method", "lora", "--target-modules", "c_atn"], "did you mean 'c_attn'?"),
    "a metric of another task": (["--metric", "pearson"], "--metric is 'pearson', which classification does not have"),
    "a class weight of no class": (["--class-weights", "poem=2"], "expected LABEL=NUMBER with a label of pet, war"),
    "a class weight that is no number": (["--class-weights", "war=two"], "--class-weights has 'war=two'"),
    "a rank of 0": (["--method", "lora", "--lora-r", "0"], "--lora-r is 0"),
    "no step": (["--max-steps", "0"], "--max-steps is 0; expected at least 1"),
    "a file in place of the run": (["--out", "base/config.json"], "is a file, and a run is kept in a folder"),
    "a dropout of 1": (["--method", "lora", "--lora-dropout", "1"], "--lora-dropout is 1"),
    "a model that is not there": (["--model", "nowhere/at/all"], "nowhere/at/all"),
    "resuming nothing": (["--resume", "--out", "nothing"], "no training run to resume"),
}


def given(name: str, value: object) -> list[str]:
    option = "--" + name.replace("_", "-")
    return [option] if value is True else ["--no-" + option[2:]] if value is False else [option, str(value)]


VALUES = {
    **{"lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.1, "target_modules": "c_attn", "num_virtual_tokens": 4},
    **{"quantize": "int8", "double_quant": False, "metric": "accuracy", "lm_coef": 0.2, "class_weights": "balanced"},
    "router_aux_loss_coef": 0.1,
}
# The options that a method or a kind of task has not, beside which they have no effect.
WITHOUT_EFFECT = [("method", m, name) for name in VALUES for m in METHODS if m not in BY_METHOD.get(name, METHODS)]
WITHOUT_EFFECT += [("task", t, name) for name in VALUES for t in TASKS if t not in BY_TASK.get(name, TASKS)]


@pytest.mark.parametrize(("other", "value", "name"), WITHOUT_EFFECT)
def test_an_option_without_effect_is_refused(capsys, other, value, name):
    """Before anything is read; both options are named."""
    rest = {"task": "lm", "method": "full"} | {other: value}
    command = ["--model", "none", "--data", "none", "--task", rest["task"], "--method", rest["method"]]
    assert gptfast("finetune", *command, *given(name, VALUES[name])) == 1
    option = "--" + name.replace("_", "-")
    assert f"error: finetune: {option} has no effect with --{other} {value}; it is for " in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"`{name}` has no effect with `{other}` {value}"):
        finetune("none", "none", rest["task"], rest["method"], **{name: VALUES[name]})


def test_double_quantisation_is_for_nf4(capsys):
    command = ["--model", "none", "--data", "none", "--task", "lm", "--method"]
    for method, more, got in (("qlora", ["--quantize", "int8"], "int8"), ("prompt", [], "none")):
        assert gptfast("finetune", *command, method, *more, "--double-quant") == 1
        assert f"--double-quant is for --quantize nf4, got {got}" in capsys.readouterr().err
    assert gptfast("finetune", *command, "lora", "--quantize", "nf4") == 1
    assert "take --method qlora" in capsys.readouterr().err


def test_a_comparison_gives_each_method_its_options():
    """One that none of the methods has is left for the method to refuse."""
    options = {"lora_r": 4, "num_virtual_tokens": 6, "double_quant": False, "seed": 1}
    had = {method: set(of_method(method, options)) for method in METHODS}
    lora = {"lora_r", "seed"}
    assert had == {
        **{"full": {"seed"}, "lora": lora, "qlora": lora | {"double_quant"}, "prompt": {"num_virtual_tokens", "seed"}}
    }
    assert "double_quant" in of_method("prompt", {**options, "quantize": "nf4"})


@pytest.mark.parametrize("case", OPTIONS)
def test_bad_options(tmp_path, capsys, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    options, said = OPTIONS[case]
    assert said in failure(capsys, tmp_path, *options)
    assert not (tmp_path / "out" / "last").exists()


@pytest.mark.parametrize("name", ["model", "data", "tokenizer", "class_weights", "target_modules"])
def test_what_is_no_text_is_named(tmp_path, name):
    given = {"model": "m", "data": "d", "task": "classification", "method": "lora", name: ["c_attn"]}
    with pytest.raises(TypeError, match=f"^finetune: {name} is a list; expected a text"):
        finetune(out=tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


def test_what_must_be_said(tmp_path, capsys):
    for given, missing in (([], "--model"), (["--model", "x"], "--data"), (["--model", "x", "--data", "y"], "--task")):
        assert gptfast("finetune", *given) == 1
        assert f"{missing} is missing" in capsys.readouterr().err
    with pytest.raises(TypeError, match=r"no option 'learning_rat'; did you mean 'learning_rate'\?"):
        finetune("x", "y", "chat", learning_rat=1.0)
    for name in ("compare", "show_batch"):
        with pytest.raises(TypeError, match=f"'{name}' is of the command line"):
            finetune("x", "y", "chat", **{name: True})


def test_a_run_that_is_there_is_kept(tmp_path, capsys):
    assert run(tmp_path) == 0
    before = (tmp_path / "out" / "best" / "model.safetensors").read_bytes()
    assert "already has a training run; continue it with --resume, replace it with --overwrite" in failure(
        capsys, tmp_path
    )
    assert "classification-0.jsonl, which it cannot change" in failure(capsys, tmp_path, "--resume", task="entailment")
    assert "--seed is 3 but the run" in failure(capsys, tmp_path, "--resume", "--seed", "3")
    data = tmp_path / "classification-0.jsonl"
    kept = data.read_text()
    write(data, records("classification", 40, 7))
    assert "are not those that" in failure_of(capsys, "--resume", "--out", tmp_path / "out")
    data.write_text(kept)
    assert (tmp_path / "out" / "best" / "model.safetensors").read_bytes() == before
    assert gptfast("finetune", "--resume", "--out", tmp_path / "out", "--max-steps", "10") == 0
    assert result(tmp_path)["steps"] == 10


def test_a_run_that_was_killed_in_its_first_save_begins_again(tmp_path, capsys):
    """What such a kill leaves is no checkpoint: there is nothing to resume, and nothing to replace."""
    files(tmp_path)
    (tmp_path / "out" / "last" / ".saving").mkdir(parents=True)
    (tmp_path / "out" / "last" / ".saving" / "model.safetensors").write_bytes(b"")
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 0, "val_loss": 9.0}\n')
    assert "no training run to resume" in failure_of(capsys, "--resume", "--out", tmp_path / "out")
    assert run(tmp_path) == 0
    assert result(tmp_path)["steps"] == 8
    assert '"val_loss": 9.0' not in (tmp_path / "out" / "log.jsonl").read_text()


def failure_of(capsys, *arguments) -> str:
    capsys.readouterr()
    assert gptfast("finetune", *arguments) == 1
    return capsys.readouterr().err.splitlines()[0]


def test_an_adapter_is_resumed_on_its_own_base_only(tmp_path, capsys):
    assert run(tmp_path, "--method", "lora", "--max-steps", "4") == 0
    base(tmp_path / "base", seed=1)  # other weights in the same place
    said = failure_of(capsys, "--resume", "--out", tmp_path / "out", "--max-steps", "8")
    assert re.search(r"base is another model than the one that .*last was trained on", said)
    gpt = GPT.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        gpt.wte.weight[0] += 1  # of the base the blocks alone are in the adapter's mark
    base(tmp_path / "base", seed=0)
    right = GPT.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        right.wte.weight[0, 0] += 1e-6
    right.save_pretrained(tmp_path / "base")
    assert "is another model" in failure_of(capsys, "--resume", "--out", tmp_path / "out", "--max-steps", "8")


def test_a_soft_prompt_of_an_early_version_is_told(tmp_path, capsys):
    """Its options say nf4, which had no effect."""
    base(tmp_path / "base", n_embd=64)
    assert run(tmp_path, "--method", "prompt", "--num-virtual-tokens", "4", "--max-steps", "2") == 0
    file = tmp_path / "out" / "last" / TRAINER
    raw = json.loads(file.read_text())
    raw["source"]["finetune"]["quantize"] = "nf4"
    raw["files"][TRAINER] = own_checksum(raw)
    file.write_text(json.dumps(raw))
    said = failure_of(capsys, "--resume", "--out", tmp_path / "out", "--max-steps", "4")
    assert "or an early gptfast began it, where --quantize had no effect: start it again" in said


def test_a_checkpoint_of_a_task_as_the_model(tmp_path, capsys):
    assert run(tmp_path) == 0
    task = tmp_path / "out" / "best"
    assert "is a checkpoint of classification" in failure(
        capsys, tmp_path, "--model", task, "--method", "lora", "--overwrite"
    )
    others = write(tmp_path / "others.jsonl", [{**r, "label": r["label"].upper()} for r in GOOD])
    assert "the label 'PET' is not in the set; expected one of 'pet', 'war'" in failure(
        capsys, tmp_path, "--model", task, "--data", others, "--out", tmp_path / "new"
    )
    assert run(tmp_path, "--model", task, out="more") == 0  # trained on
    with pytest.raises(ValueError, match=r"checkpoint of a task.*TaskModel\.from_pretrained"):
        GPT.from_pretrained(task)
    assert run(tmp_path, "--method", "lora", out="lora") == 0
    with pytest.raises(FileNotFoundError, match=r"holds an adapter.*/base'\)\.load_adapter"):
        GPT.from_pretrained(tmp_path / "lora" / "best")


def test_a_soft_prompt_has_room_and_no_new_tokens(tmp_path, capsys):
    said = failure(capsys, tmp_path, "--method", "prompt", "--num-virtual-tokens", "32")
    assert "num-virtual-tokens is 32 and the model's block_size 32, which leaves no room for tokens" in said
    said = failure(capsys, tmp_path, "--method", "prompt", "--num-virtual-tokens", "30")
    assert (
        "a row has 2 positions (block_size less virtual tokens), of which the delimiters of classification leave 0"
        in said
    )
    gpt = GPT.from_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match="gets new tokens for its chat template, whose embeddings method prompt does not"
    ):
        attach(gpt, MethodOptions("prompt"), "base", True)  # of a tokenizer without an end token
