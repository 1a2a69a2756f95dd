"""The names that clients give for a model and its adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from gptfast.nn.selection import BASE
from gptfast.serving.protocol import ApiError


class Names:
    """NAME for the served model without adapters, and NAME:ADAPTER for it with one of them.

    cards: of GET /v1/models, the model's first.
    """

    def __init__(self, name: str, adapters: Sequence[str]) -> None:
        self._adapters: dict[str, str | None] = {name: BASE if adapters else None}
        self._adapters |= {f"{name}:{adapter}": adapter for adapter in adapters}
        common = {"object": "model", "created": int(time.time()), "owned_by": "gptfast"}
        self.cards: list[dict[str, Any]] = [{"id": id, **common} for id in self._adapters]
        for card in self.cards[1:]:
            card["parent"] = name

    def adapter_of(self, name: str) -> str | None:
        """The adapter that a name asks for, as in `Request`. Raises ApiError for an unknown name."""
        if name not in self._adapters:
            known = ", ".join(map(repr, self._adapters))
            raise ApiError(
                404, f"the model {name!r} does not exist; this server has {known}", "model", "model_not_found"
            )
        return self._adapters[name]

    def card(self, name: str) -> dict[str, Any]:
        """The card of a model. Raises ApiError for an unknown name."""
        self.adapter_of(name)
        return next(card for card in self.cards if card["id"] == name)
