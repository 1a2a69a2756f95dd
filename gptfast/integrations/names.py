"""Makes `attn_implementation="gptfast"` known to transformers. Imports nothing but the standard library."""

from __future__ import annotations

from typing import Any

NAME = "gptfast"


def register() -> None:
    """Enter the attention and its mask; without the mask causality would be lost. transformers has been imported."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, sdpa_mask)


def _attention(module: Any, *operands: Any, **options: Any) -> Any:
    """`gptfast.integrations.attention.attention_forward`, imported when a model runs."""
    from gptfast.integrations.attention import attention_forward

    return attention_forward(module, *operands, **options)
