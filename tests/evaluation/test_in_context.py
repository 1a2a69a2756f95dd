"""In-context learning: templates, scores of labels, shots, answers, tasks, the command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import gptfast
from gptfast.evaluation import (
    Template,
    choose_shots,
    evaluate_task,
    extract_answer,
    few_shot_prompt,
    load_task,
    load_template,
    majority,
    score_labels,
    self_consistency,
)
from gptfast.evaluation.in_context import wilson
from gptfast.evaluation.labels import ContinuationScorer, encode_pair
from gptfast.evaluation.tasks import TASKS
from gptfast.tokenizer import get_tokenizer
from tests.evaluation.test_perplexity import run

LABELS = ["positive", "negative", "very much so"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return get_tokenizer("gpt2")


@pytest.fixture(scope="module")
def model() -> gptfast.GPT:
    torch.manual_seed(1)
    gpt = gptfast.GPT(gptfast.GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=192, vocab_size=50257, dropout=0.1))
    for parameter in gpt.parameters():
        parameter.data *= 3
    return gpt.eval()


def logprob(model: Any, ids: list[int], first: int) -> float:
    with torch.no_grad():
        rows = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
    return float(rows[torch.arange(first - 1, len(ids) - 1), torch.tensor(ids[first:])].sum())


@pytest.mark.parametrize("format", [None, "fp32"])
def test_scores_are_those_of_the_whole_text(model: Any, tokenizer: Any, format: str | None):
    judge = model.compile_for_inference(format) if format else model
    template = load_template("sentiment")
    prompt, empty = (template.render({"text": text}, template.examples[:2]) for text in ("Great fun.", "N/A"))
    expected = {}
    for text in (prompt, empty):
        ids = len(tokenizer.encode(text))
        expected[text] = [logprob(model, tokenizer.encode(f"{text} {label}"), ids) for label in LABELS]
    sizes = [len(tokenizer.encode(" " + label)) for label in LABELS]
    for normalize, wanted in {
        "sum": expected[prompt],
        "token": [x / n for x, n in zip(expected[prompt], sizes, strict=True)],
        "byte": [x / len(label) for x, label in zip(expected[prompt], LABELS, strict=True)],
        "calibrated": [x - y for x, y in zip(expected[prompt], expected[empty], strict=True)],
    }.items():
        content_free = empty if normalize == "calibrated" else None
        found = score_labels(judge, tokenizer, prompt, LABELS, normalize, content_free)
        assert list(found) == LABELS and list(found.values()) == pytest.approx(wanted, abs=2e-4)


def test_a_shared_prefix_changes_nothing(model: Any, tokenizer: Any):
    """Prompts that begin alike, are equal, shorter, or have nothing in common with the one before."""
    scorer = ContinuationScorer(model, most=2)
    for prompt in ("a b c d e f", "a b c x", "a b c x", "a b", "z", "a b c d e f g h"):
        ids = tokenizer.encode(prompt)
        found = scorer(ids, [[11], [12, 13], [14, 15, 16], [17]])
        assert found == ContinuationScorer(model)(ids, [[11], [12, 13], [14, 15, 16], [17]])
        for one, tokens in zip(found, ([11], [12, 13], [14, 15, 16], [17]), strict=True):
            assert one.logprob == pytest.approx(logprob(model, ids + tokens, len(ids)), abs=2e-4)


@pytest.mark.parametrize("labels", ["ab", ["a", 3], [b"a"]])
def test_labels_that_are_no_texts(model: Any, tokenizer: Any, labels: Any):
    with pytest.raises(TypeError, match=r"score_labels: labels are .*; expected a list of texts"):
        score_labels(model, tokenizer, "to be", labels)


def test_greedy_is_seen(model: Any, tokenizer: Any):
    ids = tokenizer.encode("To be")
    best = model.generate([ids], max_new_tokens=3, eos_token_id=None)[0][len(ids) :]
    scorer = ContinuationScorer(model)
    other = [*best[:-1], (best[-1] + 1) % 50257]
    assert [one.is_greedy for one in scorer(ids, [best, other, best[:1], [best[0], 0]])] == [
        True,
        False,
        True,
        best[1] == 0,
    ]


def test_join_of_context_and_continuation(tokenizer: Any):
    for context, continuation in (("a", " b"), ("a ", "b"), ("a \n", "b"), ("wo", "rd b")):
        before, after = encode_pair(tokenizer, context, continuation)
        assert (
            tokenizer.decode(before) == context.rstrip() and tokenizer.decode(before + after) == context + continuation
        )


def test_shipped_templates():
    shots = load_template("translation").examples[:2]
    assert load_template("translation").render({"source": "cheese"}, shots) == (
        "Translate English to French:\nsea otter => loutre de mer\npeppermint => menthe poivrée\ncheese =>"
    )
    thought = load_template("arithmetic-cot")
    text = thought.render({"question": "How many?"}, thought.examples[:1])
    assert "tennis balls each is 6" in text and text.endswith("The answer is 11.\n\nQ: How many?\nA:")
    assert load_template("sentiment").render({"text": "Good."}) == "Review: Good.\nSentiment:"
    assert load_template("arithmetic").render({"question": "2 + 2?"}) == "Q: 2 + 2?\nA:"


def test_templates_refuse():
    with pytest.raises(ValueError, match="template sentiment: 'text' is undefined; the item has the fields label"):
        load_template("sentiment").render({"label": "x"})
    with pytest.raises(ValueError, match=r"template sentiment: .*'label'"):
        load_template("sentiment").render({"text": "x"}, [{"text": "y"}])
    with pytest.raises(ValueError, match="template template: line 2: "):
        Template("a\n{% for x %}")
    with pytest.raises(ValueError, match="template 'mood': no such template; expected one of sentiment, "):
        load_template("mood")
    for source in ("{{ text.__class__.__mro__ }}", "{% include 'x' %}", "{{ text + 1 }}", "{{ 1 / 0 }}"):
        with pytest.raises(ValueError, match=r"template template: .*; the item has the fields text"):
            Template(source).render({"text": "x"})


def test_shots():
    pool = [{"text": str(n), "label": "x"} for n in range(20)]
    many = choose_shots(pool, 20, seed=3)
    assert sorted(map(str, many)) == sorted(map(str, pool)) and many != pool
    for k in range(20):
        assert choose_shots(pool, k, seed=3) == many[:k]
    assert many[0] not in choose_shots(pool, 19, seed=3, exclude=dict(many[0]))
    assert choose_shots(pool, 5, seed=4) != many[:5]
    assert choose_shots(pool[:3], 5, 3, None, many[3:])[3:] == choose_shots(many[3:], 2, 3)
    with pytest.raises(ValueError, match="choose_shots: k is 20, but the pool has 19 items"):
        choose_shots(pool, 20, seed=3, exclude=many[0])
    with pytest.raises(ValueError, match="choose_shots: k is -1"):
        choose_shots(pool, -1, seed=3)


def test_the_items_of_a_file_are_shown_before_each_other(tmp_path: Path):
    """All are solved; the template's examples stand in where there are too few, those with a label that may be chosen."""
    rows = [{"text": f"Text {n}", "label": "good" if n % 2 else "negative"} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = load_task(tmp_path / "rows.jsonl", "sentiment", ["good", "negative"])
    assert task.items == task.pool == rows and {example["label"] for example in task.spare} == {"negative"}
    for item in rows:
        shown = choose_shots(task.pool, 5, 0, item, task.spare)
        assert item not in shown and all(shot in rows for shot in shown[:4]) and shown[4] in task.spare


def test_shots_that_do_not_fit_are_dropped(tokenizer: Any):
    template, shots = load_template("sentiment"), load_template("sentiment").examples
    item = {"text": "Fine."}
    sizes = [len(tokenizer.encode(template.render(item, shots[:n]))) for n in range(5)]
    for context in range(sizes[0] + 2, sizes[4] + 4):
        fits = max(n for n in range(5) if sizes[n] + 2 <= context)
        found = few_shot_prompt(template, item, shots, tokenizer, context, room=2)
        assert found == (template.render(item, shots[:fits]), fits, 4 - fits)
    with pytest.raises(ValueError, match=f"the item alone has {sizes[0]} tokens and its answer 2, but the context has"):
        few_shot_prompt(template, item, shots, tokenizer, sizes[0] + 1, room=2)


def test_answers():
    assert extract_answer("so it is 12. The answer is 11.", r"answer is (-?\d+)") == "11"
    assert extract_answer("12 or 13", r"\d+") == "12" and extract_answer("none", r"\d+") is None
    with pytest.raises(ValueError, match="extract_answer: pattern is '\\('"):
        extract_answer("x", "(")
    assert majority(["a", None, "b", "b", None, None]) == "b"
    assert majority(["b", "a", "a", "b"]) == "b" and majority([None]) is None and majority([]) is None
    seen: list[int] = []

    def generate(prompt: str, seed: int) -> str:
        seen.append(seed)
        return prompt + ["It is 4", "no idea", "It is 5", "It is 5"][seed]

    assert self_consistency(generate, "2 + 2 = ? ", 4, r"is (\d)") == ("5", ["4", None, "5", "5"], 0.5)
    assert seen == [0, 1, 2, 3]
    assert self_consistency(lambda prompt, seed: "", "x", 2, r"\d") == (None, [None, None], 0.0)


@pytest.mark.parametrize("name", TASKS)
def test_tasks(model: Any, tokenizer: Any, name: str):
    task = load_task(name)
    assert len(task.items) == 200 and len(task.pool) == 64
    assert (
        [dict(x) for x in load_task(name).items]
        == [dict(x) for x in task.items]
        != [dict(x) for x in load_task(name, seed=1).items]
    )
    found = evaluate_task(model, tokenizer, task, shots=(0, 1), limit=4)
    assert [point["shots"] for point in found["curve"]] == [0, 1] and found["accuracy"] == found["curve"][1]["accuracy"]
    for sample, item in zip(found["samples"], task.items, strict=False):
        asked, answer = item["question" if name == "arithmetic" else "text"], item[task.target]
        assert sample["target"] == answer and asked in sample["prompt"] and sample["shots"] == 1
        assert sample["prompt"].count(answer) <= 1 + asked.count(answer) or task.labels or name == "arithmetic"
        assert set(sample["scores"]) == set(task.labels or [answer])
    if name == "addition":
        assert all(eval(item["text"]) == int(item["label"]) for item in task.items)
    if name == "reversal":
        assert all(item["text"].split()[::-1] == item["label"].split() for item in task.items)
    if name == "induction":
        assert all(re.search(rf"\b{x['text'].split()[-1]} {x['label']}\b", x["text"]) for x in task.items)


def test_interval():
    assert wilson(5, 10) == pytest.approx([0.2366, 0.7634], abs=1e-4)
    assert wilson(0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4) and wilson(10, 10)[1] <= 1.0
    for items in range(1, 200):
        for solved in (0, 1, items):
            low, high = wilson(solved, items)
            assert 0 <= low <= solved / items <= high <= 1


def test_command(model: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    folder, file = tmp_path / "model", tmp_path / "reviews.jsonl"
    model.save_pretrained(folder)
    tokenizer.save(folder)
    rows = [
        {"text": f"Review number {n}" + 9 * " was good", "label": ["positive", "negative"][n % 2]} for n in range(9)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", folder, "--task", file, "--template", "sentiment", "--labels", "positive,negative"]
    found = json.loads(
        run(capsys, monkeypatch, *options, "--shots", "0,1,8", "--log-samples", "--json", "--out", tmp_path / "o")
    )
    assert found["items"] == 9 and [point["shots"] for point in found["curve"]] == [0, 1, 8]
    assert found["dropped_shots"] > 0 and len(found["samples"]) == 9
    assert json.loads((tmp_path / "o" / "results.json").read_text()) == found
    assert (tmp_path / "o" / "shots.png").read_bytes().startswith(b"\x89PNG")
    for sample in found["samples"]:
        expected = score_labels(model, tokenizer, sample["prompt"], ["positive", "negative"])
        assert sample["scores"] == pytest.approx(expected, abs=1e-4)
        assert sample["correct"] == (max(expected, key=expected.get) == sample["target"])
    table = run(capsys, monkeypatch, *options, "--normalize", "calibrated", "--quantize", "int8")
    assert "reviews.jsonl: 9 items, normalize calibrated, seed 0" in table
    both = run(
        capsys, monkeypatch, "--compare", folder, f"{folder}:int8", "--task", "copying", "--limit", "2", "--json"
    )
    assert [row["format"] for row in json.loads(both)["results"]] == [None, "int8"]


def test_files_with_a_byte_order_mark_and_line_ends_of_windows(tmp_path: Path):
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "good", "label": "yes"}\r\n\r\n')
    (tmp_path / "a.jinja").write_bytes(mark + b"Text: {{ text }}\r\nAnswer:")
    task = load_task(tmp_path / "a.jsonl", str(tmp_path / "a.jinja"))
    assert task.template.render(task.items[0]) == "Text: good\nAnswer:"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "nothing.jsonl"],
            "task 'nothing.jsonl': no such file; expected a file of records (.jsonl, .csv, .parquet), or one of genre, ",
        ),
        (["--task", "FILE"], "no template; name a shipped one"),
        (
            ["--task", "FILE", "--template", "sentiment", "--labels", "good,bad"],
            "line 1: label is 'positive'; expected one of good",
        ),
        (["--task", "EMPTY", "--template", "sentiment"], "no items"),
        (["--task", "FILE", "--template", "LATIN"], "LATIN.jsonl is not UTF-8 (byte 0xe9 at byte 3"),
        (["--task", "BARE", "--template", "sentiment"], "line 1: no text in `label`, `target`, `answer`; every item"),
        (["--task", "copying", "--shots", "0,x"], "--shots is '0,x'"),
        (["--task", "copying", "--shots", "65"], "k is 65, but the pool has 64 items"),
        (["--task", "copying", "--normalize", "mean"], "normalize is 'mean'"),
        (["--task", "copying", "--normalize", "calibrated"], "the task has no labels to choose from"),
        (["--task", "copying", "--limit", "0"], "limit is 0"),
        (["--task", "copying", "--bos"], "--bos does not go with --task"),
        (["--data", "FILE", "--shots", "1"], "--shots does not go with --data"),
        (
            ["--task", "copying", "--data", "FILE"],
            "give --data, a text to predict, --task, items to solve, or --needle",
        ),
        ([], "give --data, a text to predict, --task, items to solve, or --needle"),
    ],
)
def test_errors_of_the_command(
    model: Any, tokenizer: Any, tmp_path: Path, capsys: Any, monkeypatch: Any, arguments: list[str], message: str
):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    contents = {"FILE": '{"text": "a", "label": "positive"}\n', "EMPTY": "\n", "BARE": '{"text": "a"}\n'}
    for name, content in contents.items():
        (tmp_path / f"{name}.jsonl").write_text(content)
    (tmp_path / "LATIN.jsonl").write_bytes(b"caf\xe9 {{ text }}")
    given = [str(tmp_path / f"{a}.jsonl") if a in {*contents, "LATIN"} else a for a in arguments]
    text = run(capsys, monkeypatch, "--model", tmp_path / "model", *given)
    assert text.startswith("error: ") and message in text
