"""AdamW with the decay groups of GPT training, and its state as plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptfast.training.config import TrainConfig

_STATE = ("exp_avg", "exp_avg_sq", "step")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups: matrices and embeddings decay, vectors (biases, LayerNorms) do not; frozen ones are left out.

    A parameter that occurs under two names (a tied head) is in one group, once.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """torch's fused AdamW (Loshchilov and Hutter, arXiv 1711.05101) over the decay groups of the model.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    groups = [group for group in decay_groups(model, config.weight_decay) if group["params"]]
    if not groups:
        raise ValueError("build_optimizer: no parameter of the model has requires_grad=True; unfreeze some")
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under the model's names: "exp_avg/h.0.attn.c_attn.weight" and so on."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = {
        f"{key}/{names[p]}": values[key] for p, values in optimizer.state.items() for key in _STATE if key in values
    }
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], source: str
) -> None:
    """Put what `optimizer_tensors` gave back, exactly.

    Args:
        source: the file they come from, for messages.
    Raises:
        ValueError: a tensor is missing or has another shape than the parameter.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        expected = {"exp_avg": parameter.shape, "exp_avg_sq": parameter.shape, "step": torch.Size([])}
        for key, shape in expected.items():
            found = tensors.get(f"{key}/{name}")
            if found is None or found.shape != shape:
                got = "is missing" if found is None else f"has shape {tuple(found.shape)}, expected {tuple(shape)}"
                raise ValueError(
                    f"{source}: {key}/{name} {got}; the file belongs to another model - resume from another "
                    "checkpoint, or start anew from these weights with --init-from"
                )
        optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device, copy=True) for key in expected}
