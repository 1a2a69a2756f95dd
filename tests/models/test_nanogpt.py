"""nanoGPT's ckpt.pt, against a model in its layout that is written here from the paper."""

from __future__ import annotations

import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

from gptfast.cli import app
from gptfast.models import GPT
from gptfast.tokenizer import CharTokenizer, load_tokenizer

ARGS = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 24, "vocab_size": 65, "dropout": 0.1}
TEXT = "".join(map(chr, range(32, 97))) * 40


class Reference:
    """A pre-norm transformer decoder (Radford et al. 2019) over a state_dict with nanoGPT's names and shapes."""

    def __init__(self, args: dict, tanh: bool = False) -> None:
        torch.manual_seed(5)
        self.args, C = args, args["n_embd"]
        shapes = {"wte.weight": (args["vocab_size"], C), "wpe.weight": (args["block_size"], C)}
        for layer in range(args["n_layer"]):
            linears = {
                "attn.c_attn": (3 * C, C),
                "attn.c_proj": (C, C),
                "mlp.c_fc": (4 * C, C),
                "mlp.c_proj": (C, 4 * C),
            }
            for name, shape in {"ln_1": (C,), "ln_2": (C,), **linears}.items():
                shapes[f"h.{layer}.{name}.weight"] = shape
                if args.get("bias", True):
                    shapes[f"h.{layer}.{name}.bias"] = shape[:1]
        shapes |= {"ln_f.weight": (C,)} | ({"ln_f.bias": (C,)} if args.get("bias", True) else {})
        self.weights = {f"transformer.{name}": 0.3 * torch.randn(shape) for name, shape in shapes.items()}
        self.weights["lm_head.weight"] = self.weights["transformer.wte.weight"]
        self.gelu = nn.GELU("tanh" if tanh else "none")

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[f"transformer.{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.weights.get(f"transformer.{name}.bias"), 1e-5)

    def __call__(self, ids: Tensor) -> Tensor:
        B, T = ids.shape
        C, H = self.args["n_embd"], self.args["n_head"]
        x = self.weights["transformer.wte.weight"][ids] + self.weights["transformer.wpe.weight"][:T]
        for n in range(self.args["n_layer"]):
            h = f"transformer.h.{n}"
            q, k, v = (
                y.view(B, T, H, C // H).transpose(1, 2)
                for y in self.linear(f"{h}.attn.c_attn", self.norm(f"h.{n}.ln_1", x)).chunk(3, -1)
            )
            scores = (q @ k.transpose(-1, -2) / math.sqrt(C // H)).masked_fill(
                torch.ones(T, T).triu(1).bool(), -torch.inf
            )
            x = x + self.linear(f"{h}.attn.c_proj", (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
            x = x + self.linear(f"{h}.mlp.c_proj", self.gelu(self.linear(f"{h}.mlp.c_fc", self.norm(f"h.{n}.ln_2", x))))
        return F.linear(self.norm("ln_f", x), self.weights["lm_head.weight"])

    def save(self, path: Path, prefix: str = "", change=lambda content: content) -> None:
        """As its train.py: with the state of an AdamW that has made a step."""
        parameters = [nn.Parameter(x.clone()) for x in self.weights.values()]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        sum(p.sum() for p in parameters).backward()
        optimizer.step()
        content = {
            "model": {prefix + name: x for name, x in self.weights.items()},
            "optimizer": optimizer.state_dict(),
            "model_args": self.args,
            "iter_num": 2000,
            "best_val_loss": torch.tensor(1.47),
            "config": {"dataset": "shakespeare_char", "compile": True, "learning_rate": 1e-3, "init_from": "scratch"},
        }
        path.parent.mkdir(exist_ok=True)
        torch.save(change(content), path)


SHAPES = {
    "no bias, compiled": ({"bias": False}, "_orig_mod."),
    "bias": ({"bias": True}, ""),
    "padded": ({"bias": False, "vocab_size": 50304, "n_embd": 16}, "_orig_mod."),
    "before the option bias: tanh": ({}, ""),
}


@pytest.mark.parametrize("name", SHAPES)
def test_logits(tmp_path: Path, name: str):
    options, prefix = SHAPES[name]
    reference = Reference({**ARGS, **options}, tanh="tanh" in name)
    reference.save(tmp_path / "out" / "ckpt.pt", prefix)
    ids = torch.randint(reference.args["vocab_size"], (2, 24))
    for path in (tmp_path / "out" / "ckpt.pt", str(tmp_path / "out")):
        model = GPT.from_pretrained(path)
        assert not model.training and model.lm_head.weight is model.wte.weight
        assert model.config.activation == ("gelu_tanh" if "tanh" in name else "gelu")
        assert (model.config.resid_pdrop, model.config.bias) == (0.1, options.get("bias", True))
        torch.testing.assert_close(model(ids), reference(ids), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "hf")
    again = GPT.from_pretrained(tmp_path / "hf")
    assert torch.equal(again(ids), model(ids))
    if options.get("vocab_size") != 50304:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
        torch.testing.assert_close(theirs(ids).logits, reference(ids), rtol=1e-4, atol=1e-4)


def test_options(tmp_path: Path):
    reference = Reference({**ARGS, "bias": True}, tanh=True)
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril()}  # a buffer where there is no fused attention
    reference.save(tmp_path / "my.pt", change=lambda c: {**c, "model": {**c["model"], **mask}})
    model = GPT.from_pretrained(
        tmp_path / "my.pt", activation="gelu_tanh", block_size=7, dropout=0.0, dtype=torch.float64
    )
    ids = torch.randint(65, (2, 7))
    torch.testing.assert_close(model(ids), reference(ids).double(), rtol=1e-4, atol=1e-4)
    reference.weights["lm_head.weight"] = torch.randn(65, 32)
    reference.save(tmp_path / "ckpt.pt")
    model = GPT.from_pretrained(tmp_path / "ckpt.pt", activation="gelu_tanh")
    assert not model.config.tie_weights
    torch.testing.assert_close(model(ids), reference(ids), rtol=1e-4, atol=1e-4)


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


WRONG = {
    "code": (lambda c: {**c, "config": Evil()}, "is a pickle that names posix.system"),
    "no shape": (lambda c: {"state_dict": c["model"]}, "has no model and model_args; expected a checkpoint of nanoGPT"),
    "the model itself": (lambda c: c["model"], "has no model and model_args"),
    "a list": (lambda c: [1], "has no model and model_args"),
    "a changed nanoGPT": (
        lambda c: {**c, "model_args": {**ARGS, "n_kv_head": 1}},
        "model_args has 'n_kv_head', which nanoGPT does not have; expected n_layer",
    ),
    "a size missing": (lambda c: {**c, "model_args": {"n_layer": 2}}, "model_args lacks n_head, n_embd"),
    "a size of text": (lambda c: {**c, "model_args": {**ARGS, "n_head": "2"}}, "model_args: GPTConfig: n_head is '2'"),
    "arguments in a list": (lambda c: {**c, "model_args": [1]}, "model_args is a list; expected a dictionary"),
    "more layers": (lambda c: {**c, "model_args": {**ARGS, "n_layer": 3}}, "h.2.ln_1.weight is missing"),
    "far more layers": (
        lambda c: {**c, "model_args": {**ARGS, "n_layer": 10**7}},
        "n_layer is 10000000, but the weights",
    ),
    "a longer block": (
        lambda c: {**c, "model_args": {**ARGS, "block_size": 25}},
        "block_size is 25, but transformer.wpe",
    ),
    "no weights": (lambda c: {**c, "model": None}, "model is a NoneType; expected a dictionary of tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.chdir(tmp_path)
    change, message = WRONG[name]
    Reference(ARGS).save(tmp_path / "ckpt.pt", change=change)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path / "ckpt.pt") in str(caught.value) or str(tmp_path) in str(caught.value)
    assert not (tmp_path / "ran").exists()


def run(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "out" / "ckpt.pt"
    Reference({**ARGS, "bias": False}).save(path, "_orig_mod.")
    assert "2 layers, 2 heads of 16" in run("info", path).output
    assert "2 layers, 2 heads of 16" in run("info", "out").output
    write = ["generate", "--prompt", "TO BE", "--max-new-tokens", 9, "--temperature", 0, "--model"]
    for model in (path, "out"):
        assert "; or name the tokenizer of the model with --tokenizer: gpt2, or a FOLDER" in str(
            run(*write, model).exception
        )
    with (tmp_path / "meta.pkl").open("wb") as file:
        pickle.dump({"itos": {}, "stoi": {}}, file)
    for pickled in ("meta.pkl", tmp_path):
        said = str(run(*write, path, "--tokenizer", pickled).exception)
        assert "meta.pkl is a pickle, which can run any program, and is never loaded; nanoGPT numbers" in said
    CharTokenizer.train(TEXT).save("letters")
    assert load_tokenizer("letters").encode(" A") == [0, 33]  # as nanoGPT numbers them
    texts = [run(*write, model, "--tokenizer", "letters").stdout for model in (path, "out")]
    assert texts[0] == texts[1] and texts[0].startswith("TO BE") and len(texts[0]) == 5 + 9 + 1


@pytest.mark.slow
def test_training_continues_from_it(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    Reference({**ARGS, "bias": False}).save(tmp_path / "out" / "ckpt.pt", "_orig_mod.")
    CharTokenizer.train(TEXT).save("letters")
    train = ["train", "--data", "text.txt", "--batch-size", 2, "--max-steps", 2, "--eval-batches", 1, "--init-from"]
    for start in ("out/ckpt.pt", "out"):
        said = str(run(*train, start, "--out", "run0").exception)
        assert f"{start} has no tokenizer and a vocabulary of 65; say which with `tokenizer` FOLDER" in said
        done = run(*train, start, "--tokenizer", "letters", "--out", f"run of {start.replace('/', ' ')}")
        assert done.exit_code == 0, done.output
    model = GPT.from_pretrained("run of out/last")
    assert model.config.block_size == 24 and not model.config.bias and model.config.activation == "gelu"
