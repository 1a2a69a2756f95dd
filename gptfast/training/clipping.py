"""Clipping of gradients in one read: their norm is taken, and the optimizer scales them in its own pass.

`torch.nn.utils.clip_grad_norm_` reads and writes all gradients once more. AdamW's fused kernel divides each by a number as it
reads it (what a scaler of mixed precision uses), so the scale costs no pass; where the norm is below the limit there is none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gptfast.training.division import is_sharded, local
from gptfast.training.ranks import Ranks
from gptfast.training.sharding import total_norm

_LEAST = 1e-6  # added to the norm, as clip_grad_norm_ does


def gradient_norm(parameters: Sequence[nn.Parameter], ranks: Ranks | None = None) -> Tensor:
    """The norm of all gradients together, a scalar on their device; it is not waited for.

    ranks: with a part of every parameter each, or None; the norm is then that of all parts, on the CPU.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if ranks is not None and ranks.sharding:
        return torch.tensor(total_norm(gradients, ranks), dtype=torch.float64)
    return torch.nn.utils.get_total_norm(gradients)


def clipped_step(
    optimizers: Sequence[torch.optim.Optimizer], norm: Tensor, limit: float, *, guarded: bool = False
) -> None:
    """A step of all optimizers with gradients of a norm of at most `limit`.

    Args:
        norm: of the gradients before, see `gradient_norm`.
        limit: 0: gradients stay as they are.
        guarded: where the norm is not finite the weights stay, without a look at it from the host; AdamW only.
    Raises:
        TypeError: guarded, and there is another optimizer than AdamW.
    """
    if guarded and not only_adamw(optimizers):
        raise TypeError("clipped_step: guarded needs AdamW alone; read the norm before the step instead")
    divisor = None if not limit else ((norm + _LEAST) / limit).clamp(min=1.0)
    if divisor is not None and not divisor.is_cuda and float(divisor) == 1.0:
        divisor = None  # on a GPU it is not looked at
    not_finite = (~torch.isfinite(norm)).float() if guarded else None
    for optimizer in optimizers:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if isinstance(optimizer, torch.optim.AdamW) and not any(map(is_sharded, gradients)):
            _fused_step(optimizer, None if divisor is None else divisor.float(), not_finite)
        else:
            if divisor is not None:
                for gradient in gradients:
                    local(gradient).div_(divisor)
            optimizer.step()


def _fused_step(optimizer: torch.optim.AdamW, divisor: Tensor | None, not_finite: Tensor | None) -> None:
    """A step of fused AdamW, which takes these two from its attributes, as `torch.amp.GradScaler` gives them."""
    optimizer.grad_scale, optimizer.found_inf = divisor, not_finite  # pyright: ignore[reportAttributeAccessIssue]
    try:
        optimizer.step()
    finally:
        del optimizer.grad_scale, optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]


def only_adamw(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    return all(isinstance(optimizer, torch.optim.AdamW) for optimizer in optimizers)
