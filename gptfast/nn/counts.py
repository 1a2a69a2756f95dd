"""What a GPT counts: its parameters, and the FLOPs of a token."""

from __future__ import annotations

from torch import nn

from gptfast.config import GPTConfig
from gptfast.nn.heads import HeadTransform
from gptfast.nn.linear import Linear
from gptfast.nn.quantized import QuantizedLinear


class Counted(nn.Module):
    """Parameters and FLOPs of a network with the modules of `Transformer`."""

    config: GPTConfig
    h: nn.ModuleList
    lm_head: Linear
    lm_transform: HeadTransform | None

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Number of parameters; tied weights count once, quantised ones (never trained) as the numbers that they stand for.

        Args:
            only_trainable: count those with requires_grad alone.
        """
        own = sum(p.numel() for p in self.parameters() if p.requires_grad or not only_trainable)
        return own if only_trainable else own + _quantized(self)

    def flops_per_token(self, T: int, training: bool = True) -> float:
        """Multiplications and additions that a sequence of T tokens needs, per token.

        2 per weight of every matrix product (the embeddings are look-ups), and 4 H D per key that a query sees, averaged over
        the queries: masked keys are not counted, so attention is about half of what PaLM's formula (arXiv 2204.02311,
        appendix B) counts. The backward pass needs twice the forward.

        Args:
            T: sequence length.
            training: forward and backward; False: forward only.
        """
        config = self.config
        matrices = sum(p.numel() for p in self.h.parameters() if p.dim() == 2) + _quantized(self.h)
        if config.n_expert and config.n_expert_per_tok:  # the biases of experts are no products
            experts = [p for p in self.h.parameters() if p.dim() == 3]
            matrices += sum(p.numel() for p in experts) * config.n_expert_per_tok // config.n_expert
            matrices -= sum(p.numel() for n, p in self.h.named_parameters() if n.endswith("_proj_bias"))
        if self.lm_transform is not None:
            matrices += self.lm_transform.c_fc.weight.numel()
        weights = self.lm_head.weight.numel() + matrices
        seen = [
            _mean_visible_keys(T, config.window_of(layer)) if config.causal else T for layer in range(config.n_layer)
        ]
        keys = sum(seen)
        return (3 if training else 1) * (2 * weights + 4 * config.attn_dim * keys)


def _quantized(model: nn.Module) -> int:
    """Numbers that the codes of quantised layers stand for."""
    return sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, QuantizedLinear))


def _mean_visible_keys(T: int, window: int | None) -> float:
    w = T if window is None else min(window, T)
    return (w * (w + 1) / 2 + (T - w) * w) / T
