"""A step that went wrong, kept to be looked at: where the first number that is not finite comes from.

    python -m gptfast.training.bad_step RUN/bad-step-000012

RUN/bad-step-N has the weights before the step, its batches, and what went wrong.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gptfast._folders import staged_folder
from gptfast._json import read_json
from gptfast._snapshots import EVERYTHING, current
from gptfast.data.packing import Batch
from gptfast.models import GPT, export
from gptfast.training.batch_loss import batch_loss
from gptfast.training.division import local
from gptfast.training.ranks import Ranks
from gptfast.training.sharding import free, plan_pass

BATCHES, ABOUT = "batches.safetensors", "step.json"


def first_bad(
    model: GPT,
    batches: Sequence[Batch],
    autocast: Callable[[], AbstractContextManager],
    device: torch.device,
    dropout_step: int | None,
    ranks: Ranks | None = None,
) -> tuple[str, int]:
    """The module whose output is the first that is not finite, or the parameter whose gradient is; "": none. And the rank in whose
    rows it is.

    The step is repeated with the dropout masks of `dropout_step`; the model's own counter and gradients stay. All ranks call it
    at the same time.
    """
    found: list[str] = []
    after, sharded = model.dropout_step, ranks is not None and bool(ranks.sharding)
    kept = [p.grad for p in model.parameters()]
    gradients = {name: f"the gradient of {name}" for name, _ in model.named_parameters()}
    names = [*(name for name, _ in model.named_modules()), "the loss", *gradients.values()]
    together, told = ranks if sharded else None, ("", 0)
    hooks = [module.register_forward_hook(_noting(name, found)) for name, module in model.named_modules() if name]
    model.dropout_step = dropout_step
    try:
        for batch in batches:
            model.zero_grad(set_to_none=True)
            if ranks is not None and sharded:
                plan_pass(model, ranks, last=True)
            with autocast():
                loss = batch_loss(model, batch, device)
            own = found[0] if found else "" if torch.isfinite(loss) else "the loss"
            told = _told(names, own, together)
            if told[0]:
                break
            loss.backward()
            bad = (n for n, p in reversed(list(model.named_parameters())) if p.grad is not None and not _finite(p.grad))
            told = _told(names, gradients.get(next(bad, ""), ""), together)
            if told[0]:
                break
        return told if sharded else _told(names, told[0], ranks)
    finally:
        for hook in hooks:
            hook.remove()
        if sharded:
            free(model)
        model.dropout_step = after
        for p, grad in zip(model.parameters(), kept, strict=True):
            p.grad = grad


def _told(names: list[str], own: str, ranks: Ranks | None) -> tuple[str, int]:
    """The first of `names` that a process has found, and which one; "", 0: none has. own: what this one found, or ""."""
    if ranks is None:
        return own, 0
    found = ranks.exchange([names.index(own) if own else math.inf], "the search for what is not finite")
    first, rank = min((number, rank) for rank, (number,) in enumerate(found))
    return (names[int(first)], rank) if first < math.inf else ("", 0)


def _noting(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not all(map(_finite, _tensors(output))) and all(map(_finite, _tensors(inputs))):
            found.append(name)

    return note


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(local(tensor)).all())


def _tensors(values: Any) -> list[Tensor]:
    values = values if isinstance(values, (tuple, list)) else [values]
    return [value for value in values if isinstance(value, Tensor)]


def keep(folder: Path, model: GPT, batches: Sequence[Batch], about: dict[str, Any]) -> None:
    """Write a step to a folder: weights, batches, and `about`: step, dropout (seed and step), dtype, what went wrong, and the number
    of the first row in the whole batch ("first_row").

    Raises:
        OSError: it cannot be written.
    """
    tensors = {f"{name}{n}": part for n, batch in enumerate(batches) for name, part in zip("xye", batch, strict=False)}
    with staged_folder(folder, replaces=EVERYTHING) as stage:
        export.save(model, stage, patched=True)
        export.write_tensors(stage / BATCHES, tensors)
        (stage / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def replay(folder: Path) -> str:
    """Repeat a step that `keep` wrote, on the CPU; what was found, in words.

    Raises:
        OSError, ValueError: the folder is none of `keep`, or damaged.
    """
    about = read_json(current(folder, ABOUT))
    model = GPT.from_pretrained(folder, dtype=torch.float32).train()
    tensors = load_file(current(folder, BATCHES))
    count = sum(name.startswith("x") for name in tensors)
    batches = [tuple(tensors[f"{name}{n}"] for name in "xye" if f"{name}{n}" in tensors) for n in range(count)]
    model.dropout_seed, step = about["dropout"]
    model.dropout_row = about.get("first_row", 0)
    dtype = getattr(torch, about["dtype"])
    autocast = nullcontext if dtype == torch.float32 else lambda: torch.autocast("cpu", dtype=dtype)
    with torch.no_grad():
        model.dropout_step = step
        losses = []
        for batch in batches:
            with autocast():
                losses.append(float(batch_loss(model, batch, "cpu")))
    found, _ = first_bad(model, batches, autocast, torch.device("cpu"), step)
    lines = [
        f"step {about['step']}: {about['wrong']}",
        f"losses of its {len(batches)} passes again: {', '.join(f'{loss:.4f}' for loss in losses)}",
        f"not finite first: {found}" if found else "everything is finite this time",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(replay(Path(sys.argv[1])))
