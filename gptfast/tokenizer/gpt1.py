"""The tokenizer of GPT-1: BPE over lower-cased words, each with "</w>" at its end."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from gptfast._json import naming
from gptfast.tokenizer.base import AllowedSpecial, check_text, choose_special, library_errors, save_files, unknown_id
from gptfast.tokenizer.hf_files import HFFiles, Merge, hf_content, read_hf_files
from gptfast.tokenizer.pieces import GPT1

_END_OF_WORD = "</w>"


class OpenAIGPTTokenizer:
    """GPT-1's BPE, as in the `openai-gpt` checkpoint (40478 tokens, no end-of-text token).

    It loses case and layout: text is lower-cased, runs of blanks and newlines become single spaces, and a character
    that the vocabulary lacks becomes <unk>.
    """

    kind = "openai-gpt"
    cuts = GPT1  # where a text can be divided: see `gptfast.tokenizer.pieces`
    eos_id: int | None = None

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[Merge], unk_token: str = "<unk>") -> None:
        if unk_token not in vocab:
            raise ValueError(f"OpenAIGPTTokenizer: vocab has no {unk_token!r}; vocab.json belongs to another tokenizer")
        self.vocab, self.merges, self.unk_token = dict(vocab), list(merges), unk_token
        with library_errors("OpenAIGPTTokenizer: {error}; vocab.json and merges.txt belong to different tokenizers"):
            model = models.BPE(
                vocab=self.vocab, merges=self.merges, unk_token=unk_token, end_of_word_suffix=_END_OF_WORD
            )
        self._rust, self._with_unk = RustTokenizer(model), RustTokenizer(model)
        for rust in (self._rust, self._with_unk):
            rust.normalizer = normalizers.BertNormalizer(lowercase=True)
            rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._with_unk.add_special_tokens([unk_token])
        self._tokens = {i: token for token, i in self.vocab.items()}

    @property
    def vocab_size(self) -> int:
        return max(self._tokens) + 1

    def has_token(self, token: int) -> bool:
        return token in self._tokens

    def encode(self, text: str, allowed_special: AllowedSpecial = ()) -> list[int]:
        check_text("OpenAIGPTTokenizer", text)
        allowed = choose_special("OpenAIGPTTokenizer", allowed_special, (self.unk_token,))
        return (self._with_unk if allowed else self._rust).encode(text).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8").removesuffix(" ")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return "".join(map(self._token, ids)).encode("utf-8")

    def _token(self, i: int) -> str:
        token = self._tokens.get(int(i))
        if token is None:
            raise unknown_id("OpenAIGPTTokenizer", int(i), self.vocab_size)
        return token[: -len(_END_OF_WORD)] + " " if token.endswith(_END_OF_WORD) else token

    def files(self) -> dict[str, bytes]:
        config = {"tokenizer_class": "OpenAIGPTTokenizer", "unk_token": self.unk_token}
        return hf_content(self.vocab, self.merges, config)

    def save(self, folder: str | os.PathLike[str]) -> None:
        save_files(folder, self.files())

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> OpenAIGPTTokenizer:
        found = read_hf_files(folder)
        with naming(folder):
            return cls.of_files(found)

    @classmethod
    def of_files(cls, files: HFFiles) -> OpenAIGPTTokenizer:
        """The tokenizer of files that are already read."""
        return cls(files.vocab, files.merges)
