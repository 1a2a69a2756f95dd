"""Optimizers: AdamW with decay groups, Muon for the matrices inside the blocks, Lion, and their state as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptfast.machine import choose_dtype
from gptfast.training.config import TrainConfig
from gptfast.training.division import local

_STATE = {"AdamW": ("exp_avg", "exp_avg_sq", "step"), "Muon": ("momentum_buffer",), "Lion": ("exp_avg",)}
_MOMENTUM = 0.95  # Muon


def decay_groups(
    parameters: Sequence[nn.Parameter], weight_decay: float, biases: frozenset[int] = frozenset()
) -> list[dict]:
    """The non-empty parameter groups: matrices and embeddings decay; vectors (biases, LayerNorms) do not. Where some are divided
    among other ranks than the rest, they have groups of their own: a step of torch takes one kind at a time.

    biases: ids of parameters that are vectors beside those of one dimension, as the biases of experts are."""
    found: dict[tuple[bool, int], list[nn.Parameter]] = {}
    vectors = {id(p) for p in parameters if p.dim() < 2} | biases
    for p in sorted(parameters, key=lambda p: id(p) in vectors):
        found.setdefault((id(p) in vectors, len(getattr(p, "placements", ()))), []).append(p)
    return [
        {"params": group, "weight_decay": 0.0 if is_vector else weight_decay} for (is_vector, _), group in found.items()
    ]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """torch's fused AdamW (Loshchilov and Hutter, arXiv 1711.05101) for the decay groups of the trainable parameters.

    With optimizer="muon" torch's Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) updates the matrices
    inside the blocks. Its step is the momentum with all singular values set to about 1, scaled to the size of an AdamW step
    (Liu et al., arXiv 2502.16982), so that both use one learning rate. With "lion" it is lion-pytorch's Lion (Chen et al.,
    arXiv 2302.06675, algorithm 2) for all of them.

    Args:
        model: a GPT, or with AdamW any module.
        config: of the run.
    Raises:
        ValueError: the model has no trainable parameter.  ImportError: lion-pytorch is not installed.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("build_optimizers: no parameter of the model has requires_grad=True; unfreeze some")
    biases = frozenset(id(p) for name, p in model.named_parameters() if name.endswith("_bias"))  # a vector an expert
    inside = (
        {id(p) for p in model.get_submodule("h").parameters() if p.dim() == 2} - biases
        if config.optimizer == "muon"
        else set()
    )
    matrices = [p for p in trainable if id(p) in inside]
    groups = decay_groups([p for p in trainable if id(p) not in inside], config.weight_decay, biases)
    rate, betas = config.learning_rate, (config.beta1, config.beta2)
    if config.optimizer == "lion":
        return [_lion(groups, rate, betas)]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True))
    if matrices:
        options = {"weight_decay": config.weight_decay, "momentum": _MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
        fast = all(choose_dtype(p.device)[0] == "bfloat16" for p in matrices)
        optimizers.append((torch.optim.Muon if fast else Muon)(matrices, lr=rate, **options))
    return optimizers


class Muon(torch.optim.Muon):
    """torch's Muon with adjust_lr_fn="match_rms_adamw" whose products are of fp32: for CPUs without instructions for bfloat16, on
    which torch's, always of bfloat16, take ten times as long as the rest of a step."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            momentum, rate = group["momentum"], group["lr"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p.grad)
                buffer = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
                p.mul_(1 - rate * group["weight_decay"])
                update = _orthogonal(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
                p.add_(update.to(p.dtype), alpha=-rate * 0.2 * max(p.shape) ** 0.5)


def _orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """x with singular values of about 1, by the iteration x <- a x + (b g + c g^2) x, g = x x^T, as torch's Muon has it."""
    a, b, c = coefficients
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        g = x @ x.T
        x = torch.addmm(x, torch.addmm(g, g, g, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _lion(groups: list[dict], rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
    try:
        import lion_pytorch as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("`optimizer` lion needs a package that is not installed: pip install lion-pytorch") from error
    return package.Lion(groups, lr=rate, betas=betas)


def parameters_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[nn.Parameter]:
    """All parameters in the optimizers' groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state by state and parameter, such as "exp_avg/h.0.attn.c_attn.weight"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[p]}": values[key].detach().contiguous()
        for optimizer in optimizers
        for p, values in optimizer.state.items()
        for key in _STATE[type(optimizer).__name__]
    }


def bytes_of_training(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> int:
    """Bytes of what this process has of the model and, after a step, of the optimizers' state; scalars do not count."""
    states = [
        p
        for optimizer in optimizers
        for p in parameters_of([optimizer])
        for key in _STATE[type(optimizer).__name__]
        if key != "step"
    ]
    return sum(local(p).nbytes for p in [*model.parameters(), *states])


def empty_optimizer_tensors(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Tensors as `optimizer_tensors` has them after a step, of zeros, and divided as the parameters are."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{key}/{names[p]}": torch.zeros(()) if key == "step" else torch.zeros_like(p.detach())
        for optimizer in optimizers
        for p in parameters_of([optimizer])
        for key in _STATE[type(optimizer).__name__]
    }


def restore_optimizers(
    model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], tensors: dict[str, Tensor], source: str
) -> None:
    """Restore the state that `optimizer_tensors` returned, exactly.

    Args:
        source: the file of the tensors, for messages.
    Raises:
        ValueError: a tensor is missing or has another shape than the parameter.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for p in parameters_of([optimizer]):
            shapes = {key: torch.Size([]) if key == "step" else p.shape for key in _STATE[type(optimizer).__name__]}
            state = {key: _find(tensors, f"{key}/{names[p]}", shape, source) for key, shape in shapes.items()}
            optimizer.state[p] = {key: tensor.to(p.device, copy=True) for key, tensor in state.items()}


def _find(tensors: dict[str, Tensor], name: str, shape: torch.Size, source: str) -> Tensor:
    found = tensors.get(name)
    if found is None or found.shape != shape:
        got = "is missing" if found is None else f"has shape {tuple(found.shape)}, expected {tuple(shape)}"
        raise ValueError(
            f"{source}: {name} {got}; the file belongs to another model or optimizer - resume from another checkpoint, "
            "or start a new run from these weights with gptfast train --init-from"
        )
    return found
