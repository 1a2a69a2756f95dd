"""gptfast explain: the inside of a GPT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptfast._json import to_text
from gptfast._options import option, values_of
from gptfast.cli._load import MODEL_HELP, TOKENIZER_HELP, load
from gptfast.cli._options import Options, takes

if TYPE_CHECKING:
    from gptfast.tokenizer import Tokenizer

MOST_NUMBERS = 1 << 20  # attention weights that JSON holds; more are in attention.npy
SHOWN = 10  # next tokens


@dataclass(frozen=True)
class Subject:
    """What `gptfast explain` looks at."""

    model: str | None = option(None, MODEL_HELP)
    tokenizer: str | None = option(None, TOKENIZER_HELP, words="the checkpoint's own")
    prompt: str | None = option(None, "The text to look at.")
    analogy: str | None = option(
        None, "Three words a,b,c: the embeddings nearest to a - b + c, such as king,man,woman."
    )
    temperature: float = option(
        0.7, "Beside the model's own distribution of the next token, the one at this temperature."
    )
    top_k: int = option(5, "And with no more than this many tokens.")
    top_p: float = option(0.9, "And with the fewest tokens that have this share.")
    beams: int = option(3, "Width of the beam tree.")
    steps: int = option(4, "Tokens of the beam tree; fewer where the prompt leaves no room for them.")
    worked_example: bool = option(
        False,
        "Attention on four tokens of four numbers and byte pair encoding of five words, step by step, without a model.",
    )
    out: Path | None = option(None, "Folder for the pictures, and attention.npy.")
    json: bool = option(False, "Print one JSON object instead of a page.")


@takes(Options(Subject))
def explain(options: dict[str, Any]) -> None:
    """Look inside a GPT: tokens, attention, what each layer would say, the next token, beams; or follow a small example by hand.

    [bold]Examples[/]

      [cyan]gptfast explain --model runs/bard/best --prompt "To be, or not" --out runs/inside[/]

      [cyan]gptfast explain --model gpt2 --prompt "The king" --analogy " king, man, woman"[/]

      Without a model:

      [cyan]gptfast explain --worked-example[/]
    """
    subject = Subject(**values_of(Subject, options))
    if subject.worked_example:
        if subject.model or subject.prompt:
            raise ValueError("explain: `worked_example` needs no `model` and no `prompt`; leave them out")
        return _worked_example(subject)
    if not subject.model or not subject.prompt:
        raise ValueError("explain: give `model` and `prompt`, or `worked_example`")
    value = _explain(subject, *load(subject.model, None, subject.tokenizer))
    if subject.json:
        print(to_text(value))
    else:
        _show(value, subject)


def _explain(subject: Subject, model: Any, tokenizer: Tokenizer) -> dict[str, Any]:
    from gptfast.evaluation.inside import analogy, look_inside, nearest
    from gptfast.generation.beam_tree import beam_tree
    from gptfast.models.parameter_table import parameter_table
    from gptfast.tokenizer import encode_prompt, token_text
    from gptfast.tokenizer.base import encode_part

    def text(token: int) -> str:
        found = token_text(tokenizer, token)
        return found if isinstance(found, str) else repr(found)

    ids = encode_prompt(tokenizer, subject.prompt or "")
    inside = look_inside(model, ids)
    last = nearest(model, model.wte.weight[ids[-1]], min(5, model.config.vocab_size - 1), exclude=(ids[-1],))
    groups = parameter_table(model.config)
    room = model.config.block_size - len(ids)  # none is left after a prompt that fills the context
    tree = beam_tree(model, ids, subject.beams, min(subject.steps, room)) if room else []
    value: dict[str, Any] = {
        "ids": ids,
        "tokens": [text(token) for token in ids],
        "attention": {"shape": list(inside.attention.shape)},
        "logit_lens": [
            {
                "layer": layer,
                "id": int(row[-1]),
                "token": text(int(row[-1])),
                "logprob": float(inside.lens_logprobs[layer, -1]),
            }
            for layer, row in enumerate(inside.lens_ids)
        ],
        "neighbours": [{"id": token, "token": text(token), "cosine": cosine} for token, cosine in last],
        "next": _next(model, ids, subject, text),
        "beams": [node._asdict() | {"text": text(node.token)} for node in tree],
        "parameters": {
            "total": sum(group.count for group in groups),
            "groups": {group.category: group.count for group in groups},
        },
        "flops_per_token": model.flops_per_token(len(ids), training=False),
    }
    if subject.analogy:
        words = subject.analogy.split(",")
        tokens = [encode_part(tokenizer, word) for word in words]
        if len(words) != 3 or any(len(token) != 1 for token in tokens):
            raise ValueError(
                f"explain: `analogy` is {subject.analogy!r}, {[len(token) for token in tokens]} tokens; expected three words of one "
                "token each, with their blanks: ' king, man, woman'"
            )
        found = analogy(model, *(token[0] for token in tokens))
        value["analogy"] = [{"id": token, "token": text(token), "cosine": cosine} for token, cosine in found]
    _keep(value, inside, model, subject, text)
    return value


def _next(model: Any, ids: list[int], subject: Subject, text: Any) -> list[dict[str, Any]]:
    """The likeliest next tokens, with their probabilities under each setting of sampling."""
    import torch

    from gptfast.evaluation.inside import distribution

    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.wte.weight.device), last_only=True)[0].float()
    settings = {
        "probability": {},
        "temperature": {"temperature": subject.temperature},
        "top_k": {"top_k": subject.top_k},
        "top_p": {"top_p": subject.top_p},
    }
    columns = {name: distribution(logits, **options) for name, options in settings.items()}
    best = columns["probability"].topk(min(SHOWN, len(logits))).indices.tolist()
    return [{"id": n, "token": text(n)} | {name: float(p[n]) for name, p in columns.items()} for n in best]


def _keep(value: dict[str, Any], inside: Any, model: Any, subject: Subject, text: Any) -> None:
    """Put the weights of attention into the result, and write pictures."""
    small = inside.attention.size <= MOST_NUMBERS
    value["attention"]["weights"] = inside.attention.tolist() if small else None
    if subject.out is None:
        if not small:
            value["attention"]["note"] = f"{inside.attention.size:,} weights: --out FOLDER writes them to attention.npy"
        return
    import io

    import numpy as np
    import torch

    from gptfast._files import atomic_write
    from gptfast.evaluation import pictures

    out, tokens = subject.out, [pictures.visible(token) for token in value["tokens"]]
    out.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.save(buffer, inside.attention)
    atomic_write(out / "attention.npy", buffer.getvalue())
    value["attention"]["file"] = str(out / "attention.npy")
    for layer, weights in enumerate(inside.attention):
        pictures.draw_attention(weights, tokens, layer, out / f"attention_{layer:02d}.png")
    pictures.draw_mask(tokens, model.config.window_of(1), out / "mask.png")
    lens = [[pictures.visible(text(int(token))) for token in row] for row in inside.lens_ids]
    pictures.draw_lens(lens, inside.lens_logprobs, tokens, out / "logit_lens.png")
    following = value["next"]
    labels = {
        "probability": "the model's own",
        "temperature": f"temperature {subject.temperature:g}",
        "top_k": f"top-k {subject.top_k}",
        "top_p": f"top-p {subject.top_p:g}",
    }
    columns = {label: [row[name] for row in following] for name, label in labels.items()}
    pictures.draw_distribution([pictures.visible(row["token"]) for row in following], columns, out / "next_token.png")
    tree = value["beams"]
    names = [f"{pictures.visible(node['text'])}  {node['logprob']:.2f}" for node in tree]
    parents, depths, kept = ([node[name] for node in tree] for name in ("parent", "depth", "kept"))
    if tree:
        pictures.draw_tree(names, parents, depths, kept, out / "beams.png")
    rotary = model.config.position_embedding == "rotary"
    table = torch.cat((model.rotary.cos, model.rotary.sin), 1) if rotary else model.wpe.weight.detach().float()
    table = table.cpu().numpy()
    pictures.draw_positions(table, model.config.position_embedding, out / "positions.png")


def _show(value: dict[str, Any], subject: Subject) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    pairs = "  ".join(f"{token!r} {n}" for token, n in zip(value["tokens"], value["ids"], strict=True))
    console.print(f"tokens      {pairs}", markup=False, soft_wrap=True)
    layers, heads, T, _ = value["attention"]["shape"]
    console.print(f"attention   {layers} layers, {heads} heads, {T} x {T} weights each")
    flops = value["flops_per_token"]
    console.print(f"parameters  {value['parameters']['total']:,}; {flops / 1e6:,.1f} million operations a token")
    near = "  ".join(f"{row['token']!r} {row['cosine']:.2f}" for row in value["neighbours"])
    console.print(f"nearest     to {value['tokens'][-1]!r} by embedding: {near}", markup=False, soft_wrap=True)
    if "analogy" in value:
        found = "  ".join(f"{row['token']!r} {row['cosine']:.2f}" for row in value["analogy"])
        console.print(f"analogy     {found}", markup=False, soft_wrap=True)
    lens = Table("after layer", "would say", "probability", box=None, pad_edge=False, title="logit lens, last position")
    import math

    for row in value["logit_lens"]:
        name = "embedding" if row["layer"] == 0 else str(row["layer"])
        lens.add_row(name, escape(repr(row["token"])), f"{math.exp(row['logprob']):.3f}")
    console.print(lens)
    names = ("probability", "temperature", "top_k", "top_p")
    heads_of = (
        "next token",
        "probability",
        f"temperature {subject.temperature:g}",
        f"top-k {subject.top_k}",
        f"top-p {subject.top_p:g}",
    )
    table = Table(*heads_of, box=None, pad_edge=False)
    for row in value["next"]:
        table.add_row(escape(repr(row["token"])), *(f"{row[name]:.3f}" for name in names))
    console.print(table)
    if subject.out is not None:
        console.print(f"pictures    {subject.out}", markup=False, soft_wrap=True)


def _worked_example(subject: Subject) -> None:
    from gptfast.evaluation.worked_example import attention_example, bpe_example

    value = {"attention": attention_example(), "bpe": bpe_example()}
    if subject.out is not None:
        from gptfast.evaluation.pictures import draw_positions, draw_worked_example
        from gptfast.nn.position import sinusoids

        subject.out.mkdir(parents=True, exist_ok=True)
        draw_worked_example(value["attention"], subject.out / "attention.png")
        draw_positions(sinusoids(64, 64).numpy(), "sinusoidal", subject.out / "positions.png")
    if subject.json:
        print(to_text(value))
        return
    attention = value["attention"]
    for name, title in (
        ("input", "four tokens x; queries, keys and values are x itself"),
        ("scaled", "scores x x^T / sqrt(4)"),
        ("masked", "masked: no token looks at a later one"),
        ("weights", "softmax of each row"),
        ("output", "weights times values"),
    ):
        print(f"\n{title}")
        for row in attention[name]:
            print("  " + "  ".join("  -inf" if x is None else f"{x:6.3f}" for x in row))
    for name, rows in attention["backends"].items():
        worst = max(
            abs(a - b) for x, y in zip(rows, attention["output"], strict=True) for a, b in zip(x, y, strict=True)
        )
        print(f"  causal_attention on {name}: within {worst:.1e} of this")
    print("\n" + "\n".join(attention["notes"]))
    print(f"\nbyte pair encoding of {', '.join(f'{word} x {n}' for word, n in value['bpe']['words'].items())}")
    for step in value["bpe"]["steps"]:
        corpus = "  ".join("|".join(pieces) for pieces, _ in step["corpus"])
        print(f"  {' + '.join(step['pair']):10} {step['count']:3} times -> {step['token']:6} {corpus}")
