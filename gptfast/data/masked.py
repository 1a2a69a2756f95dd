"""Rows for BERT's pre-training: two texts in a row, and tokens that are masked (Devlin et al., arXiv 1810.04805, section 3.1).

Everything that is drawn for a row is a function of (seed, number of the row in the endless order), by Philox4x32-10: so it depends
neither on the batch size nor on the number of processes, and a resumed run needs no state. The counter of position j of row r is
(j, r mod 2**32, r div 2**32, "mask"); its four words decide whether the position is chosen, what is put there, and which random
token that may be. That of the row itself has 2**32 - 1 in the place of j.  B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gptfast.data.mixture import Mixture, MixtureSampler
from gptfast.data.sampler import WindowSampler, derived_seed, documents_of
from gptfast.data.token_file import TokenFile
from gptfast.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

MASKING_DOMAIN = 0x6D61736B  # "mask"
_ROW = 2**32 - 1
_MASKED, _RANDOM = round(0.8 * 2**32), round(0.9 * 2**32)  # below the first [MASK], below the second a random token
_IGNORED = -100
_ROLES = ("mask_token", "cls_token", "sep_token", "pad_token", "unk_token")


@dataclass(frozen=True, eq=False)
class MaskTokens:
    """What masking needs of a tokenizer.

    mask, cls, sep: ids. specials: ids that are never masked. continues: (V,) bool, tokens that go on inside a word.
    """

    mask: int
    cls: int
    sep: int
    specials: np.ndarray
    continues: np.ndarray

    @classmethod
    def of(cls, tokenizer: Tokenizer | None) -> MaskTokens:
        """The mask tokens of a BERT's tokenizer. Raises ValueError for one without [MASK], [CLS] or [SEP]."""
        found: Any = getattr(tokenizer, "inner", tokenizer)
        ids: list[Any] = [found.special_id(role) for role in _ROLES] if hasattr(found, "special_id") else [None]
        if None in ids[:3]:
            kind = "none was given" if tokenizer is None else f"{tokenizer.kind!r} has none"
            raise ValueError(
                f"objective mlm needs a tokenizer with [MASK], [CLS] and [SEP], and {kind}; use `tokenizer` wordpiece, or the "
                "folder of a BERT"
            )
        continues = np.array([found.continues(i) for i in range(found.vocab_size)])
        specials = np.array(sorted({i for i in ids if i is not None}))
        return cls(ids[0], ids[1], ids[2], specials, continues)


class MaskedSampler:
    """Rows [CLS] first [SEP] second [SEP], whose second text follows the first in half of the rows and is from another document in
    the others; or [CLS] text [SEP]. A text is a window of the tokens, in the order of `WindowSampler`.

    Args:
        tokens: a token file or an array (N,) of ids.
        block_size: T, at least 8.
        batch_size: B.
        special: of the tokenizer.
        vocab_size: V of the model: random tokens are drawn from all of it.
        seed: in [0, 2**64).
        probability: part of the tokens that are chosen, in (0, 1); at least one of a row is.
        whole_words: choose words instead of tokens, until that part is reached.
        next_sentence: two texts in a row.
    Raises:
        ValueError: a block_size that is too small, or too few tokens.
    """

    def __init__(
        self,
        tokens: TokenFile | np.ndarray,
        block_size: int,
        batch_size: int,
        special: MaskTokens,
        vocab_size: int,
        seed: int = 0,
        probability: float = 0.15,
        whole_words: bool = False,
        next_sentence: bool = True,
    ) -> None:
        if block_size < 8:
            raise ValueError(
                f"MaskedSampler: block_size is {block_size}; expected at least 8, for two texts and [CLS], [SEP]"
            )
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.special, self.vocab_size, self.probability = special, vocab_size, probability
        self.whole_words, self.next_sentence = whole_words, next_sentence
        self._length = block_size - (3 if next_sentence else 2)  # tokens of the text in a row
        self._windows = WindowSampler(tokens, self._length - 1, batch_size, seed)
        self._take, self._count = self._windows.take, len(tokens)
        self._documents = documents_of(tokens) if isinstance(tokens, TokenFile) else np.zeros(1, np.int64)
        self.rows_per_epoch = self._windows.windows_per_epoch

    def batch_from(self, row: int, count: int | None = None) -> dict[str, Tensor]:
        """The batch that begins with row number `row`: the arguments of `BERT.forward`, int64.

        input_ids, token_type_ids, labels: (B, T), labels -100 where nothing was chosen. next_sentence_label: (B,), 1 where the second
        text is from elsewhere; missing without `next_sentence`.
        """
        import torch

        numbers = np.arange(row, row + (self.batch_size if count is None else count))
        rows, types, elsewhere = self._rows(numbers)
        inputs, labels = self._masked(rows, numbers)
        found = {"input_ids": inputs, "token_type_ids": types, "labels": labels}
        found |= {"next_sentence_label": elsewhere} if self.next_sentence else {}
        return {name: torch.from_numpy(x) for name, x in found.items()}

    def _rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, T) tokens and their types, and (B,) whether the second text is from elsewhere."""
        starts = self._windows.starts_from(int(numbers[0]), len(numbers))
        texts = self._windows.tokens_at(starts)
        rows = np.full((len(numbers), self.block_size), self.special.sep, np.int64)
        rows[:, 0] = self.special.cls
        types, elsewhere = np.zeros_like(rows), np.zeros(len(numbers), np.int64)
        if not self.next_sentence:
            rows[:, 1:-1] = texts
            return rows, types, elsewhere
        drawn = np.stack(self._words(np.array([_ROW]), numbers))[:, :, 0]  # 4 B
        least = max(1, self._length // 4)
        for n, (coin, place, low, high) in enumerate(drawn.T.tolist()):
            first = least + (place * (self._length - 2 * least + 1) >> 32)
            text, elsewhere[n] = texts[n], coin & 1
            second = (
                self._elsewhere(int(starts[n]), self._length - first, high << 32 | low) if coin & 1 else text[first:]
            )
            rows[n, 1 : first + 1], rows[n, first + 2 : -1] = text[:first], second
            types[n, first + 2 :] = 1
        return rows, types, elsewhere

    def _elsewhere(self, start: int, length: int, draw: int) -> np.ndarray:
        """Tokens from a random place outside of the document at `start`; of a single document from anywhere."""
        last = self._count - length + 1  # places where so many tokens begin
        n = int(np.searchsorted(self._documents, start, "right")) - 1
        begin = int(self._documents[n])
        end = int(self._documents[n + 1]) if n + 1 < len(self._documents) else self._count
        begin, end = min(begin, last), min(end, last)
        if last - (end - begin) <= 0:
            begin = end = 0
        place = draw * (last - (end - begin)) >> 64
        place += (end - begin) if place >= begin else 0
        return self._take(place + np.arange(length)).astype(np.int64)

    def _masked(self, rows: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels, (B, T): of the chosen tokens 80% are [MASK], 10% random, 10% as they were."""
        keys, what, which, _ = self._words(np.arange(rows.shape[1]), numbers)
        free = ~np.isin(rows, self.special.specials)
        chosen = self._chosen(rows, free, keys)
        inputs = np.where(chosen & (what < _MASKED), self.special.mask, rows)
        drawn = which * self.vocab_size >> 32
        inputs = np.where(chosen & (what >= _MASKED) & (what < _RANDOM), drawn, inputs)
        return inputs, np.where(chosen, rows, _IGNORED)

    def _chosen(self, rows: np.ndarray, free: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """(B, T) bool: those with the smallest keys of each row; of words all tokens, by the key of the first one."""
        wanted = np.maximum(1, np.rint(self.probability * free.sum(1))).astype(np.int64)
        if self.whole_words:
            goes_on = np.zeros_like(free)
            goes_on[:, 1:] = free[:, 1:] & free[:, :-1] & self.special.continues[rows[:, 1:]]
            first = np.maximum.accumulate(np.where(goes_on, 0, np.arange(rows.shape[1])), axis=1)
            keys = np.take_along_axis(keys, first, 1)
        else:
            first = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        order = np.lexsort((np.broadcast_to(first, keys.shape), np.where(free, keys, 2**32)), axis=1)
        places = np.empty_like(order)  # of each token in the order of its row
        np.put_along_axis(places, order, np.broadcast_to(np.arange(rows.shape[1]), rows.shape), 1)
        return free & (np.take_along_axis(places, first, 1) < wanted[:, None])

    def _words(self, positions: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        """Four words of 32 bits for each position of each row, (B, n) int64 each."""
        import torch

        from gptfast.rng import philox4x32

        j, r = torch.from_numpy(positions)[None], torch.from_numpy(numbers)[:, None]
        domain = torch.full((1, 1), MASKING_DOMAIN, dtype=torch.int64)
        return tuple(x.numpy() for x in philox4x32((j, r & 0xFFFFFFFF, r >> 32, domain), self.seed))


class MaskedMixtureSampler:
    """Rows of the sources of a mixture, dealt as `MixtureSampler` deals them; each is a row of its source's `MaskedSampler`, so
    that a second text from elsewhere is from another document of the same source.

    Args:
        mixture: the sources.
        block_size, batch_size, seed: as of `MaskedSampler`.
        options: its others, in their order.
    Raises:
        ValueError: as `MaskedSampler`, with the name of the source.
    """

    def __init__(
        self,
        mixture: Mixture,
        block_size: int,
        batch_size: int,
        special: MaskTokens,
        vocab_size: int,
        seed: int,
        *options: Any,
    ) -> None:
        self.batch_size = batch_size
        self._samplers: list[MaskedSampler] = []
        for k, (name, file) in enumerate(zip(mixture.names, mixture.files, strict=True)):
            own = derived_seed(seed, k)
            try:
                found = MaskedSampler(file, block_size, batch_size, special, vocab_size, own, *options)
            except ValueError as error:
                raise ValueError(f"source {name}: {error}") from None
            self._samplers.append(found)
        self.probability = self._samplers[0].probability
        # Places do not depend on the length of windows.
        self._places = MixtureSampler(mixture, 1, batch_size, seed).places

    def batch_from(self, row: int, count: int | None = None) -> dict[str, Tensor]:
        """As `MaskedSampler.batch_from`."""
        import torch

        places = self._places(np.arange(row, row + (self.batch_size if count is None else count)))
        rows = [self._samplers[k].batch_from(n, 1) for k, n in zip(*(x.tolist() for x in places), strict=True)]
        return {name: torch.cat([one[name] for one in rows]) for name in rows[0]}
