"""Experts in training: the loss that spreads tokens over them, and their load.  L layers, E experts, N tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gptfast import ops
from gptfast.nn.experts import ExpertMLP
from gptfast.nn.transformer import Transformer
from gptfast.training.config import AUX_LOSS_COEF, TrainConfig
from gptfast.training.ranks import Ranks

_DECIMALS = 5  # of a load in the log


class Routing:
    """What the routers of a model choose in the passes of a step.

    The auxiliary loss of a pass is the mean over the layers of `gptfast.ops.load_balance_loss`. Tokens without a target do not
    count. Where ranks share a batch, the shares of tokens that go to each expert are those of all of them, so that their number
    changes the loss by rounding only.

    Args:
        model: with experts.
        coef: weight of the auxiliary loss in what is minimised, >= 0.
        ranks: the processes that have a part of every batch each; None: this one has it all.
    """

    def __init__(self, model: Transformer, coef: float, ranks: Ranks | None = None) -> None:
        self.coef, self.ranks = coef, ranks
        self._experts = [m for m in model.modules() if isinstance(m, ExpertMLP)]
        self._shape = len(self._experts), self._experts[0].router.out_features
        self.begin()

    @classmethod
    def of(
        cls, model: Transformer, config: TrainConfig, ranks: Ranks | None = None, what: str = "train"
    ) -> Routing | None:
        """The routing of a run; None: the model has no experts. The weight of its loss is the config's, by default AUX_LOSS_COEF where
        the routers are trained and 0 where they are frozen.

        Args:
            model, ranks: as for the class.
            config: of the run.
            what: the command, for messages.
        Raises:
            ValueError: a weight of a loss that the model does not have.
        """
        given, experts = config.router_aux_loss_coef, model.config.n_expert
        if experts is None and given is not None:
            raise ValueError(
                f"{what}: `router_aux_loss_coef` is {given:g} but the model has no experts (n_expert is None); leave it out, or "
                "train a model with experts, such as `preset` gptoss-tiny"
            )
        if experts is None:
            return None
        trained = any(m.router.weight.requires_grad for m in model.modules() if isinstance(m, ExpertMLP))
        return cls(model, (AUX_LOSS_COEF if trained else 0.0) if given is None else given, ranks)

    def begin(self) -> None:
        """Begin a step."""
        self._counts, self._tokens, self._loss = torch.zeros(self._shape, dtype=torch.float64), 0, 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The forward of a pass, whose choices are kept for `loss`; a block that is computed again is not watched."""
        for module in self._experts:
            module.routed = []
        try:
            yield
            self._found = [module.routed or [] for module in self._experts]
        finally:
            for module in self._experts:
                module.routed = None

    def loss(self, targets: Tensor, share: float) -> Tensor:
        """What the pass adds to the loss that is minimised: `coef` times its auxiliary loss.

        Args:
            targets: (B, T), of the tokens of the pass, or their ids; -100: the token does not count.
            share: the part of this pass in the loss of the step.
        """
        kept, self._found = self._found, []
        layers = [[torch.cat(parts) for parts in zip(*passes, strict=True)] for passes in kept]
        counts = (targets != -100).flatten().to(layers[0][0].device)
        k = layers[0][1].shape[1]
        weights = counts.double().repeat_interleave(k)
        own = [weights.new_zeros(self._shape[1]).index_add(0, experts.flatten(), weights) for _, experts in layers]
        sent, tokens = self._of_all(torch.stack(own), int((targets != -100).sum()))
        each = [
            ops.load_balance_loss(logits, experts, counts, sent=part / max(tokens, 1))
            for (logits, experts), part in zip(layers, sent, strict=True)
        ]
        loss = torch.stack(each).mean()
        self._loss = self._loss + share * loss.detach().double()
        return self.coef * loss

    def skip(self) -> None:
        """Take part in a pass in which this rank has no targets."""
        self._of_all(torch.zeros(self._shape, dtype=torch.float64), 0)

    def _of_all(self, counts: Tensor, tokens: int) -> tuple[Tensor, int]:
        """Counts (L, E) and tokens of a pass, of all ranks together; both are added to those of the step."""
        if self.ranks is not None:
            *flat, together = self.ranks.sum([*counts.flatten().tolist(), tokens], "the loads of experts")
            counts, tokens = counts.new_tensor(flat).view(self._shape), int(together)
        self._counts, self._tokens = self._counts.to(counts.device) + counts, self._tokens + tokens
        return counts, tokens

    def figures(self) -> dict[str, Any]:
        """Figures of the step for the log: "router_aux_loss", without its weight, and "expert_load", (L, E): the share of a layer's
        choices that each expert got, which is 1 / E where all have as many."""
        total = self._counts.sum(1, keepdim=True).clamp(min=1)
        loss = self._loss if self.ranks is None else self.ranks.sum([float(self._loss)], "the loss of routers")[0]
        return {"router_aux_loss": loss, "expert_load": (self._counts / total).round(decimals=_DECIMALS)}
