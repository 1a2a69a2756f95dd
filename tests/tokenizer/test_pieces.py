"""Long texts in pieces: the ids of the whole, by the tokenizers that cut them, whatever the text; and in little memory."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from gptfast.data import Document
from gptfast.data.encode import encode_documents
from gptfast.tokenizer import BPETokenizer, CharTokenizer, GPT2Tokenizer, WordTokenizer
from gptfast.tokenizer.pieces import GPT2, LINES, blocks_of, pieces
from tests.support.texts import byte_level, train_gpt1

LETTERS = ["a", "B", "é", "e\u0301", "日本", "1", "23", "²", "_", "🎭", "👩\u200d👧"]
MARKS = ["'", "'s", "\u2019", "'ll", '"', ".", "-", "=", "。", "<|endoftext|>", " a.\n"]
BLANKS = [" ", "  ", "\n", "\r\n", "\r", "\t", "\u00a0", "\u2028", "\u3000", "\x1c", "\x85", "\u200b"]
PARTS = st.sampled_from(LETTERS + MARKS + BLANKS)
TEXTS = st.lists(PARTS, max_size=30).map("".join)
KINDS = ["gpt2", "bpe", "word", "char", "openai-gpt"]


@pytest.fixture(scope="module")
def tokenizers():
    text = "a b c d's e\n\n f\n\té\u2028 . 's\n é日本。1 23² _'\u2019\"-=🎭" * 3
    return {
        "gpt2": GPT2Tokenizer(),
        "bpe": BPETokenizer.train(text, 280),
        "word": WordTokenizer.train(text),
        "char": CharTokenizer.train(text, unk=True),
        "openai-gpt": train_gpt1(text),
    }


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=300)
@given(text=TEXTS, size=st.integers(1, 9))
def test_pieces_have_the_ids_of_the_whole(tokenizers, kind, text, size):
    tokenizer = tokenizers[kind]
    whole = tokenizer.encode(text)
    for cuts in (tokenizer.cuts, LINES):
        cut = list(pieces(blocks_of(text, size), cuts))
        assert "".join(cut) == text
        assert [i for piece in cut for i in tokenizer.encode(piece)] == whole
    if hasattr(tokenizer, "encode_array"):
        array = tokenizer.encode_array(text)
        assert array.dtype == np.uint32 and array.tolist() == whole


BLOCK = 9_000
LONG = {
    "blanks": "a" + " " * 30_000 + "b" + "\n" * 30_000 + "c" + "\t \u00a0\n" * 9_999 + "d",
    "no newline": "It's 12 o'clock -- don't. " * 3_000,
    "emoji": "👩\u200d👧🎭🇩🇪❤️ 🎭" * 4_000,
    "CRLF": "a line\r\n\r\n  of it's 2\r\n" * 2_000,
    "CR": "a line\rand one\r\r" * 3_000,
    "no blank": "it's,12:o'clock--don't.日本。" * 3_000,
    "hexadecimal": random.Random(0).randbytes(30_000).hex(),
    "marks": "".join(random.Random(1).choices("=-'\"#_", k=60_000)),
    "one letter": "a" * 60_000,
}


@pytest.fixture(scope="module")
def library(tokenizers):
    return byte_level(tokenizers["gpt2"].vocab, tokenizers["gpt2"].merges)


@pytest.mark.parametrize("name", LONG)
def test_adversarial_texts(tokenizers, library, name):
    """Encoded from blocks, on several threads; against the `tokenizers` library, which encodes the whole at once."""
    text, ours = LONG[name], tokenizers["gpt2"]
    found = list(encode_documents([Document("d", text)], ours, block=BLOCK))
    ids = np.concatenate([ids for _, ids, _ in found])
    assert ids.tolist() == library.encode(text).ids == ours.encode(text)
    assert sum(n_bytes for *_, n_bytes in found) == len(text.encode())
    assert name in ("blanks", "marks", "one letter") or len(found) > 3


def test_ten_megabytes_without_a_blank(tokenizers):
    part = "it's,12:o'clock--don't.0123456789abcdef日本。"
    text = part * (10_000_000 // len(part.encode()) + 1)
    sizes = [len(piece) for piece in pieces(blocks_of(text), GPT2)]
    assert len(sizes) > 30 and max(sizes) < 600_000
    ids = np.concatenate([ids for _, ids, _ in encode_documents([Document("d", text)], tokenizers["gpt2"])])
    assert np.array_equal(ids, np.tile(tokenizers["gpt2"].encode(part), len(text) // len(part)))


@pytest.mark.parametrize("blank", [" ", "\n"])
def test_blanks_by_the_million(tokenizers, blank):
    """tiktoken by itself panics there."""
    ours, text = tokenizers["gpt2"], "a" + blank * 1_050_000 + "b<|endoftext|>"
    assert ours.decode(ours.encode(text)) == text == ours.decode(ours.encode_array(text))
    with_end = ours.encode(text, allowed_special="all")
    assert with_end[-1] == ours.eos_id and ours.decode(with_end) == text


def test_long_text_is_really_cut():
    sizes = [len(piece) for piece in pieces(blocks_of("word word\n" * 1000, 1000))]
    assert len(sizes) == 10 and 990 <= min(sizes) <= max(sizes) <= 1010


def test_documents_stay_apart(tokenizers):
    documents = [Document(f"{i}", f"text {i}\n" * i) for i in range(40)]
    found = list(encode_documents(documents, tokenizers["gpt2"]))
    assert [n for n, *_ in found] == list(range(1, 40))
    assert [tokenizers["gpt2"].decode(ids) for _, ids, _ in found] == [d.text for d in documents[1:]]


def test_learning_from_pieces_is_learning_from_the_whole(tokenizers):
    """The library's trainer, given the text at once."""
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdeéß日", k=rng.randint(1, 9))) for _ in range(400)]
    text = "".join(rng.choice(words) + rng.choice([" ", "\n", "  ", ", ", "'s ", "1", "\r\n"]) for _ in range(9000))
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        [text], trainers.BpeTrainer(vocab_size=999, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    )
    merges = [tuple(pair) for pair in json.loads(rust.to_str())["model"]["merges"]]
    assert BPETokenizer.train(text, 1000).merges == merges
    assert BPETokenizer.train(pieces(blocks_of(text, 700), GPT2), 1000).merges == merges


@pytest.mark.parametrize("text", ["ab" * 500_000, " " * 1_000_000, "ab" * 9 + "\n" * 1_000_000])
def test_learning_from_a_run_without_end(text):
    tokenizer = BPETokenizer.train(text, 270)
    assert tokenizer.decode(tokenizer.encode(text)) == text


MEASURE = """
import resource, sys
from gptfast.data import prepare
prepare(sys.argv[1], "bpe", sys.argv[2], vocab_size=1000, progress=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_text(tmp_path):
    """A BPE of one file with one emoji, which makes a character take four bytes in a text that is held whole."""
    rng, peaks = random.Random(0), []
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 8))) for _ in range(5000)]
    line = " ".join(rng.choices(words, k=20_000)) + " 🎭\n"
    for n in (1, 200):
        path = tmp_path / f"{n}.txt"
        path.write_text(line * n)
        found = subprocess.run(
            [sys.executable, "-c", MEASURE, path, tmp_path / str(n)], capture_output=True, text=True, check=True
        )
        peaks.append(float(found.stdout))
    assert path.stat().st_size > 20_000_000
    assert peaks[1] - peaks[0] < 150  # MB; 2100 where the text is learnt from at once
