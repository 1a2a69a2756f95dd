"""Text to tokens to batches: documents, token files, and samplers of training windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptfast._lazy import lazy_names

if TYPE_CHECKING:
    from gptfast.data.corpus import load_documents
    from gptfast.data.documents import Document
    from gptfast.data.mixture import Mixture, MixtureSampler, sampler_of
    from gptfast.data.opening import is_tokens, load_tokens, open_data
    from gptfast.data.prepared import PreparedData, load_prepared, prepare
    from gptfast.data.sampler import WindowSampler, sequential_batches, shuffled
    from gptfast.data.split import Split, split_documents
    from gptfast.data.token_file import TokenFile, is_token_file, write_tokens
    from gptfast.data.token_shards import TokenShards

__all__ = [
    "Document",
    "Mixture",
    "MixtureSampler",
    "PreparedData",
    "Split",
    "TokenFile",
    "TokenShards",
    "WindowSampler",
    "is_token_file",
    "is_tokens",
    "load_documents",
    "load_prepared",
    "load_tokens",
    "open_data",
    "prepare",
    "sampler_of",
    "sequential_batches",
    "shuffled",
    "split_documents",
    "write_tokens",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Document": "gptfast.data.documents",
        "TokenShards": "gptfast.data.token_shards",
        "load_documents": "gptfast.data.corpus",
        **dict.fromkeys(("Mixture", "MixtureSampler", "sampler_of"), "gptfast.data.mixture"),
        **dict.fromkeys(("is_tokens", "load_tokens", "open_data"), "gptfast.data.opening"),
        **dict.fromkeys(("PreparedData", "load_prepared", "prepare"), "gptfast.data.prepared"),
        **dict.fromkeys(("WindowSampler", "sequential_batches", "shuffled"), "gptfast.data.sampler"),
        **dict.fromkeys(("Split", "split_documents"), "gptfast.data.split"),
        **dict.fromkeys(("TokenFile", "is_token_file", "write_tokens"), "gptfast.data.token_file"),
    },
)
