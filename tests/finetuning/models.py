"""Small random models and tokenizers for the tests of fine-tuning."""

from __future__ import annotations

from typing import Any

import torch

from gptfast import GPT, GPTConfig
from gptfast.finetuning import TaskModel
from gptfast.tokenizer import BPETokenizer, CharTokenizer, OpenAIGPTTokenizer, Tokenizer, WordTokenizer

TEXT = "the cat sat on the mat and the dog sat on the log while a bird sang to the cat and the dog " * 4
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "classification": [{"text": "the cat sat", "label": "yes"}, {"text": "a dog", "label": "no"}],
    "entailment": [
        {"premise": "the cat sat on the mat", "hypothesis": "a cat sat", "label": "entailment"},
        {"premise": "the dog", "hypothesis": "a bird sang to the cat", "label": "neutral"},
    ],
    "similarity": [
        {"text1": "the cat", "text2": "the dog sat", "score": 1.5},
        {"text1": "a bird sang", "text2": "a bird", "score": 4},
    ],
    "choice": [
        {"context": "the cat", "choices": ["sat on the mat", "log"], "label": 1},
        {"context": "the dog sat", "choices": ["and sang", "on the log"], "label": 0},
    ],
}
LABELS = {"classification": ["no", "yes"], "entailment": ["entailment", "neutral", "contradiction"]}


def bpe() -> BPETokenizer:
    return BPETokenizer.train(TEXT, 300)


def tokenizer(kind: str) -> Tokenizer:
    if kind == "openai-gpt":
        letters = sorted(set(TEXT.replace(" ", "")))
        vocab = [*letters, *(letter + "</w>" for letter in letters), "<unk>"]
        return OpenAIGPTTokenizer({token: i for i, token in enumerate(vocab)}, [])
    makers = {"bpe": bpe, "char": lambda: CharTokenizer.train(TEXT), "word": lambda: WordTokenizer.train(TEXT)}
    return makers[kind]()


def gpt(V: int, **options: Any) -> GPT:
    """A model whose weights are large enough to tell mistakes."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 48, "dropout": 0.0}
    model = GPT(GPTConfig(**{**sizes, "vocab_size": V, **options}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.eval()


def task_model(task: str, kind: str = "bpe", **options: Any) -> TaskModel:
    used = tokenizer(kind)
    gpt1 = {"norm_position": "post", "final_norm": False} if kind == "openai-gpt" else {}
    given = {name: options.pop(name) for name in ("special_tokens", "class_weights") if name in options}
    model = gpt(used.vocab_size, **gpt1, **options)
    return TaskModel(model, task, labels=LABELS.get(task), tokenizer=used, **given)
