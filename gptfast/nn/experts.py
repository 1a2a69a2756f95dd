"""The feed-forward half of a block as a mixture of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.linear import Linear
from gptfast.nn.selection import Selection

if TYPE_CHECKING:
    from gptfast.config import GPTConfig


class Router(Linear):
    """The linear layer that chooses experts. It stays in floats and gets no low-rank update."""


class ExpertMLP(torch.nn.Module):
    """k of E gated MLPs for each token, chosen by a router, through `gptfast.ops.moe`. The parameters have gpt-oss' names and shapes:
    gate_up_proj (E, C, 2 F), with gate and up in turn, and down_proj (E, F, C).

    Args:
        config: uses n_embd, inner_dim, n_expert, n_expert_per_tok, the biases of MLPs, swiglu_alpha and swiglu_limit.

    routed: a list to which each forward appends the router's logits (N, E) and the experts (N, k) of its N tokens; None: none.
    """

    routed: list[tuple[Tensor, Tensor]] | None = None

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.n_expert is None or config.n_expert_per_tok is None:
            raise ValueError(
                "ExpertMLP: n_expert is None; expected a GPTConfig with experts - `MLP` is one for all tokens"
            )
        E, C, F, bias = config.n_expert, config.n_embd, config.inner_dim, config.has_bias("mlp")
        self.k, self.alpha, self.limit = config.n_expert_per_tok, config.swiglu_alpha, config.swiglu_limit
        self.gate_up_proj = torch.nn.Parameter(torch.empty(E, C, 2 * F))
        self.gate_up_proj_bias = torch.nn.Parameter(torch.zeros(E, 2 * F)) if bias else None
        self.down_proj = torch.nn.Parameter(torch.empty(E, F, C))
        self.down_proj_bias = torch.nn.Parameter(torch.zeros(E, C)) if bias else None
        for matrix in (self.gate_up_proj, self.down_proj):
            torch.nn.init.normal_(matrix, std=0.02)
        self.router = Router(C, E, bias=bias)

    def forward(self, x: Tensor, adapters: Selection | None = None) -> Tensor:
        """(..., C) -> (..., C). The dropout after it belongs to `Block`. adapters: unused, as experts have none."""
        rows = x.flatten(0, -2)
        logits = self.router(rows)
        experts, weights = ops.route(logits, self.k)
        if self.routed is not None:
            self.routed.append((logits, experts))
        gate_up, down = self.gate_up_proj.transpose(1, 2), self.down_proj.transpose(1, 2)
        biases = self.gate_up_proj_bias, self.down_proj_bias
        form = {"alpha": self.alpha, "limit": self.limit, "layout": "interleaved"}
        return ops.moe(rows, experts, weights, gate_up, down, *biases, **form).view(x.shape)

    def extra_repr(self) -> str:
        E, C, width = self.gate_up_proj.shape
        return f"n_expert={E}, n_expert_per_tok={self.k}, n_embd={C}, n_inner={width // 2}"
