"""A small gpt-oss from training to its answers: experts in MXFP4, Harmony's channels, on the command line and by the server."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch

from gptfast import GPT, GPTConfig
from gptfast.backend import has_cpu_ops
from gptfast.checkpoints.mxfp4 import mxfp4_values
from gptfast.cli import main
from gptfast.cli._load import load
from gptfast.tokenizer.chat import encode_chat
from gptfast.tokenizer.conversation import ChatFormat
from tests.support.chat_templates import tokenizer_with
from tests.support.mxfp4 import nearest_codes, with_mxfp4
from tests.support.serving_app import Limits, create_app, httpx, openai, serving

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

QUESTION = "sat the dog ?"
TALK = [{"role": "user", "content": QUESTION}]
SAID = {  # by effort: thoughts and answer
    "low": ("the log", "on the log"),
    "medium": ("the cat sat and the dog sat", "on the mat"),
    "high": ("the dog sat on the log and the cat sat on the mat while a bird sang", "to the cat and the dog"),
}
ASK = {"model": "cat", "messages": TALK, "temperature": 0}


def written(effort: str) -> str:
    thoughts, answer = SAID[effort]
    thoughts = f"<|channel|>analysis<|message|>{thoughts}<|end|><|start|>assistant"
    return f"{thoughts}<|channel|>final<|message|>{answer}<|return|>"


def learn(model: GPT, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
    """Until each token is nearly certain, whatever compiler and instruction set round the products."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.0)
    for _ in range(400):
        loss = model(inputs, wanted)[1]
        if loss < 0.01:
            return
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"the loss is still {loss.item():.3f}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt the three replies by heart, with its experts in MXFP4."""
    path, tokenizer = tmp_path_factory.mktemp("harmony") / "model", tokenizer_with("gpt-oss")
    used = ChatFormat.of(tokenizer)
    rows, targets = [], []
    for effort in SAID:
        prompt = used.prompt(TALK, variables={"reasoning_effort": effort})
        ids = prompt + encode_chat(tokenizer, written(effort))
        rows.append(ids)
        targets.append([-100] * (len(prompt) - 1) + ids[len(prompt) :] + [-100])
    longest = max(map(len, rows))
    inputs = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    wanted = torch.tensor([row + [-100] * (longest - len(row)) for row in targets])

    sizes = {"n_layer": 2, "n_embd": 64, "n_inner": 64, "n_head": 4, "n_kv_head": 2, "head_size": 16, "n_expert": 4}
    torch.manual_seed(0)
    model = GPT(GPTConfig.preset("gptoss-tiny", vocab_size=tokenizer.vocab_size, **sizes)).train()
    learn(model, inputs, wanted)
    for name, p in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):  # rounded; the rest learns to live with that
            p.data = mxfp4_values(*nearest_codes(p.data)).transpose(1, 2).float()
            p.requires_grad_(False)
    learn(model, inputs, wanted)
    model.eval().bfloat16().save_pretrained(path)
    tokenizer.save(path)
    with_mxfp4(path, nearest_codes)
    return path


@pytest.fixture(scope="module")
def url(folder: Path):
    model, tokenizer = load(str(folder), "mxfp4")
    assert model._outside, "the experts are read where they lie"
    with serving(create_app(model, tokenizer, "cat", Limits(max_rows=4, max_queue=8, max_body=20_000))) as url:
        yield url


@pytest.mark.parametrize("effort", [None, *SAID])
def test_the_server_answers_with_the_final_channel(folder: Path, url: str, effort: str | None):
    tokens = len(encode_chat(load(str(folder), None)[1], written(effort or "medium")))
    answer, given = SAID[effort or "medium"][1], {"reasoning_effort": effort} if effort else {}
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        whole = client.chat.completions.create(**ASK, **given)
        assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == (answer, "stop")
        assert whole.usage.completion_tokens == tokens, "thoughts and headers are written too, and not shown"
        parts = [
            chunk.choices[0].delta.content for chunk in client.chat.completions.create(**ASK, **given, stream=True)
        ]
        assert "".join(part or "" for part in parts) == answer
        again = client.chat.completions.create(**ASK, extra_body={"chat_template_kwargs": given})
        assert again.choices == whole.choices


@pytest.mark.parametrize(
    ("given", "param", "text"),
    [
        ({"reasoning_effort": "minimal"}, "reasoning_effort", "is 'minimal'; expected one of low, medium, high"),
        (
            {"chat_template_kwargs": {"reasoning_effort": 3}},
            "chat_template_kwargs",
            "is 3; expected one of low, medium",
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "reasoning_effort",
            "reasoning_effort and that of chat_template_kwargs differ; give the former alone",
        ),
    ],
)
def test_other_efforts_are_refused(url: str, given: dict, param: str, text: str):
    answer = httpx.post(url + "/v1/chat/completions", json={**ASK, **given})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert text in answer.json()["error"]["message"]


@pytest.mark.parametrize("effort", [None, *SAID])
def test_chat_prints_the_final_channel(folder: Path, effort: str | None, monkeypatch, capsys):
    words = ["chat", "--model", str(folder), "--quantize", "mxfp4", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", ["gptfast", *words, *(["--reasoning-effort", effort] if effort else [])])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{QUESTION}\n".encode()), encoding="utf-8"))
    with pytest.raises(SystemExit) as stop:
        main()
    assert (stop.value.code or 0, capsys.readouterr().out) == (0, SAID[effort or "medium"][1] + "\n")
