"""Tasks solved by generation: chains of thought, answers found in texts, majorities, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast.evaluation import evaluate_task, load_task, load_template, solve_by_generation
from gptfast.tokenizer import get_tokenizer
from tests.evaluation.test_perplexity import run


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return get_tokenizer("gpt2")


@pytest.fixture(scope="module")
def model() -> gptfast.GPT:
    torch.manual_seed(3)
    gpt = gptfast.GPT(gptfast.GPTConfig(n_layer=1, n_head=2, n_embd=32, block_size=320, vocab_size=50257))
    return gpt.eval()


class Writer:
    """Stands for a model: writes given texts, in turn."""

    def __init__(self, tokenizer: Any, texts: list[str], block_size: int = 400) -> None:
        self.config = gptfast.GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=block_size, vocab_size=50257)
        self.tokenizer, self.texts, self.calls = tokenizer, texts, []

    def generate(self, ids: list[list[int]], **options: Any) -> list[list[int]]:
        self.calls.append(options)
        count = options["num_return_sequences"]
        texts = [self.texts[n % len(self.texts)] for n in range(count)]
        return [ids[0] + self.tokenizer.encode(text) for text in texts]


def questions(path: Path, count: int = 4) -> Path:
    rows = [{"question": f"What is {n} + 2?", "answer": str(n + 2)} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_the_majority_of_chains_counts(tmp_path: Path, tokenizer: Any):
    task = load_task(questions(tmp_path / "sums.jsonl"), "arithmetic-cot")
    texts = [
        " 0 + 2 = 2. The answer is 2.\n\nQ: Another?\nA: The answer is 9.",
        " Perhaps 3. The answer is 3.",
        " 0 plus 2 is 2. The answer is 2.",
        " I cannot tell.",
    ]
    writer = Writer(tokenizer, texts)
    found = solve_by_generation(writer, tokenizer, task, samples=4, shots=(2,), limit=2, seed=5)
    first, second = found["samples"]
    assert first["answers"] == ["2", "3", "2", None] and first["prediction"] == "2" and first["agreement"] == 0.5
    assert first["texts"][0] == " 0 + 2 = 2. The answer is 2." and len(first["texts"]) == 4  # cut at the blank line
    assert first["correct"] and not second["correct"] and found["accuracy"] == 0.5 and found["agreement"] == 0.5
    assert "tennis" in first["prompt"] and first["prompt"].endswith("Q: What is 0 + 2?\nA:") and first["shots"] == 2
    drawn = {"temperature": 0.7, "seed": 5, "num_return_sequences": 4, "stop_strings": "\n\n"}
    assert writer.calls[0].items() >= drawn.items()
    alone = solve_by_generation(writer, tokenizer, task, limit=1)  # one sample: the likeliest text
    assert "temperature" not in writer.calls[-1] and alone["temperature"] == 0
    assert alone["samples"][0]["answers"] == ["2"]


def test_texts_are_those_of_the_model(model: gptfast.GPT, tokenizer: Any, tmp_path: Path):
    """Through GPT and the engine, repeatable by the seed."""
    task = load_task(questions(tmp_path / "sums.jsonl"), "arithmetic")
    options = {"samples": 3, "max_new_tokens": 4, "temperature": 1.0, "limit": 1, "pattern": r"\w+"}
    found = solve_by_generation(model, tokenizer, task, **options)
    (sample,) = found["samples"]
    ids = tokenizer.encode(sample["prompt"])
    expected = model.generate(
        [ids], max_new_tokens=4, temperature=1.0, seed=0, num_return_sequences=3, eos_token_id=None
    )
    assert sample["texts"] == [tokenizer.decode(row[len(ids) :]).split("\n\n")[0] for row in expected]
    assert len(set(sample["texts"])) == 3  # drawn apart
    assert solve_by_generation(model, tokenizer, task, **options) == found
    assert solve_by_generation(model, tokenizer, task, **{**options, "seed": 1})["samples"] != found["samples"]
    packed = solve_by_generation(model.compile_for_inference("fp32"), tokenizer, task, **options)
    assert packed["samples"][0]["texts"] == sample["texts"]


def test_arithmetic_task():
    """Every generated problem says what is so, and its reasoning leads to the answer."""
    task = load_task("arithmetic", "arithmetic-cot")
    assert task.target == "answer" and len(task.items) == 200 and len(task.pool) == 64
    for item in task.items:
        a, b, c = map(int, re.findall(r"\d+", item["question"]))
        assert int(item["answer"]) == (a + b * c if "boxes" in item["question"] else a - b + c)
        assert item["reasoning"].endswith(f"= {item['answer']}.")
    shown = task.template.render({"question": "Q?"}, task.pool[:1])
    assert f"{task.pool[0]['reasoning']} The answer is {task.pool[0]['answer']}.\n\nQ: Q?\nA:" in shown


def test_an_answer_that_is_scored_follows_what_leads_to_it(model: gptfast.GPT, tokenizer: Any):
    """Shots say "A: The answer is 11."; the answer of an item was scored right after "A:"."""
    found = evaluate_task(model, tokenizer, load_task("arithmetic"), shots=(1,), limit=1)
    assert found["samples"][0]["prompt"].endswith("\nA: The answer is")


def test_items_without_reasoning_are_not_shown(tmp_path: Path):
    """The pool of a file has those items that the template's examples are like."""
    path = questions(tmp_path / "sums.jsonl", 4)
    thought, plain = load_task(path, "arithmetic-cot"), load_task(path, "arithmetic")
    assert thought.pool == [] and thought.spare == load_template("arithmetic-cot").examples
    assert len(plain.pool) == 4 and len(plain.spare) == 2


def test_errors(tokenizer: Any, tmp_path: Path):
    task, writer = load_task(questions(tmp_path / "s.jsonl"), "arithmetic-cot"), Writer(tokenizer, ["x"], 40)
    for options, message in (
        ({"samples": 0}, "solve_by_generation: samples is 0"),
        ({"max_new_tokens": 40}, "solve_by_generation: max_new_tokens is 40; expected"),
        ({"temperature": -1.0}, "solve_by_generation: temperature is -1.0"),
        ({"max_new_tokens": 8, "pattern": "("}, re.escape("solve_by_generation: pattern is '('")),
        ({"max_new_tokens": 8, "shots": ()}, "solve_by_generation: shots is empty"),
        ({"max_new_tokens": 30}, "few_shot_prompt: the item alone"),
    ):
        with pytest.raises(ValueError, match=message):
            solve_by_generation(writer, tokenizer, task, **options)


def test_command(model: gptfast.GPT, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    base = ["--model", str(folder), "--task", "arithmetic", "--template", "arithmetic-cot", "--limit", "2"]
    drawn = [*base, "--shots", "0,2", "--samples", "2", "--max-new-tokens", "4", "--answer-pattern", r"(\w+)"]
    found = json.loads(run(capsys, monkeypatch, *drawn, "--log-samples", "--json", "--out", tmp_path / "out"))
    assert [point["shots"] for point in found["curve"]] == [0, 2] and len(found["samples"]) == 2
    assert all(len(sample["texts"]) == len(sample["answers"]) == 2 for sample in found["samples"])
    assert found["samples_an_item"] == 2 and found["temperature"] == 0.7 and (tmp_path / "out" / "shots.png").exists()
    page = run(capsys, monkeypatch, *drawn)
    assert "arithmetic: 2 items, 2 texts an item at temperature 0.7, agreement" in page
    for wrong, message in (
        (["--temperature", "1"], "--temperature goes with --samples"),
        (
            ["--samples", "2", "--normalize", "token"],
            "--normalize ranks labels by likelihood and --samples writes texts",
        ),
        (["--samples", "2", "--answer-pattern", "("], "pattern is '('"),
    ):
        assert message in run(capsys, monkeypatch, *base, *wrong)
