"""Tokenizers of Hugging Face folders with settings beyond those of GPT-2 and GPT-1, run by the `tokenizers` library."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer as RustTokenizer

from gptfast.tokenizer.added import CONFIG, END_OF_TEXT
from gptfast.tokenizer.base import AllowedSpecial, check_text, choose_special, library_errors, save_files, unknown_id
from gptfast.tokenizer.hf_files import HFFiles, byte_alphabet, read_hf_files

_BYTE = {character: byte for byte, character in byte_alphabet().items()}
_END_OF_WORD = "</w>"


class HFTokenizer:
    """A BPE of bytes, or of words that end in </w>, with all settings of its files.

    Settings are a prefix space, a normalizer, tokens that are added before or after each text, and flags of added tokens.
    With all special tokens allowed the ids are those of transformers' AutoTokenizer. Added tokens that are not special are
    recognised in every text.

    Args:
        files: the content of a folder.
    Raises:
        ValueError: files that the `tokenizers` library refuses.
    """

    kind = "hf"
    whole_texts = True  # a text cannot be encoded in pieces

    def __init__(self, files: HFFiles) -> None:
        self.vocab, self.hf_files = files.vocab, files
        added = files.spec["added_tokens"]
        self.specials = {token["content"]: token["id"] for token in added if token["special"]}
        self.eos_id = self.specials.get(files.eos_token or END_OF_TEXT)
        self._added = {token["id"] for token in added}
        self._tokens = {i: token for token, i in self.vocab.items()}
        self._encoders: dict[frozenset[str], RustTokenizer] = {}
        self._encoder(frozenset())

    @property
    def vocab_size(self) -> int:
        return max(self._tokens) + 1

    def has_token(self, token: int) -> bool:
        return token in self._tokens

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        check_text("HFTokenizer", text)
        allowed = choose_special("HFTokenizer", allowed_special, self.specials)
        return self._encoder(frozenset(allowed)).encode(text).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text`, special tokens as their ids and none added, and the characters that each stands for."""
        check_text("HFTokenizer", text)
        found = self._encoder(frozenset(self.specials)).encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def encode_plain(self, text: str) -> list[int]:
        """The ids of `text`, special tokens as ordinary text and none added."""
        check_text("HFTokenizer", text)
        return self._encoder(frozenset()).encode(text, add_special_tokens=False).ids

    def _encoder(self, allowed: frozenset[str]) -> RustTokenizer:
        """The library's tokenizer that recognises these special tokens, and no others."""
        if allowed not in self._encoders:
            found = [t for t in self.hf_files.spec["added_tokens"] if not t["special"] or t["content"] in allowed]
            spec = {**self.hf_files.spec, "added_tokens": found, "truncation": None, "padding": None}
            with library_errors(
                "HFTokenizer: the tokenizers library refuses these files ({error}); they are damaged, or belong to different "
                "tokenizers"
            ):
                self._encoders[allowed] = RustTokenizer.from_str(json.dumps(spec))
        return self._encoders[allowed]

    def decode(self, ids: Iterable[int]) -> str:
        ids = [int(i) for i in ids]
        text = self.decode_bytes(ids).decode("utf-8", errors="replace")
        closes = ids and not self.hf_files.byte_level and ids[-1] not in self._added
        return text.removesuffix(" ") if closes else text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes(int(i)) for i in ids)

    def _bytes(self, i: int) -> bytes:
        token = self._tokens.get(i)
        if token is None:
            raise unknown_id("HFTokenizer", i, self.vocab_size)
        if i in self._added:
            return token.encode("utf-8")
        if not self.hf_files.byte_level:
            return (token[: -len(_END_OF_WORD)] + " " if token.endswith(_END_OF_WORD) else token).encode("utf-8")
        return bytes(_BYTE[c] for c in token) if all(c in _BYTE for c in token) else token.encode("utf-8")

    def files(self) -> dict[str, bytes]:
        """tokenizer.json and tokenizer_config.json for transformers."""
        spec = self.hf_files.spec
        decoder = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec["added_tokens"]}
        split = spec.get("pre_tokenizer") or {}
        prefix = {"add_prefix_space": split["add_prefix_space"]} if "add_prefix_space" in split else {}
        # the general class reads all of tokenizer.json; those of GPT-2 and GPT-1 ignore settings that they do not have
        config: dict[str, Any] = {**self.hf_files.settings, **prefix, "tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {"added_tokens_decoder": decoder}
        if self.eos_id is not None:
            config.setdefault("eos_token", self._tokens[self.eos_id])
            config.setdefault("bos_token", self._tokens[self.eos_id])
        return {
            "tokenizer.json": json.dumps(spec, ensure_ascii=False).encode(),
            CONFIG: json.dumps(config, indent=2).encode(),
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        save_files(folder, self.files())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> HFTokenizer:
        return cls(read_hf_files(folder))
