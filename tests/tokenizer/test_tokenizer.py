"""Tokenizers: known ids, lossless round trips, agreement with other implementations, and clear errors."""

from __future__ import annotations

import hashlib
import json
import random
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptfast.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    GPT2Tokenizer,
    OpenAIGPTTokenizer,
    StreamDecoder,
    WordTokenizer,
    get_tokenizer,
    load_tokenizer,
)
from tests.support.texts import POEM, byte_level, train_gpt1

HELLO = "Hello, world! How's everything?"
HELLO_IDS = [15496, 11, 995, 0, 1374, 338, 2279, 30]
# Text with what tokenizers trip over: contractions, blanks of every kind, digits, scripts, specials.
TRICKY = st.lists(
    st.one_of(
        st.text(max_size=20),
        st.sampled_from(["'s", "'ll", "  ", "\n\n", "\r\n", " a", "\u00a0", "\u200d", "<|endoftext|>", "日本", "1st"]),
    ),
    max_size=12,
).map("".join)


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "gpt2": GPT2Tokenizer(),
        "bpe": BPETokenizer.train(POEM * 2, 400),
        "char": CharTokenizer.train(POEM),
        "word": WordTokenizer.train(POEM),
        "openai-gpt": train_gpt1(POEM),
    }


KINDS = ["gpt2", "bpe", "char", "word", "openai-gpt"]


def test_gpt2_known_ids_without_a_network(monkeypatch):
    def connect(*args, **kwargs):
        raise AssertionError("the tokenizer asked the network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    tokenizer = get_tokenizer("gpt2")
    assert tokenizer.encode(HELLO) == HELLO_IDS
    assert tokenizer.decode(HELLO_IDS) == HELLO
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (50257, 50256)


def test_gpt2_files_are_openais_byte_for_byte(tmp_path):
    GPT2Tokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).kind == "gpt2"
    for name, expected in [
        ("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
        ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
    ]:
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == expected


def test_the_classroom_example():
    counts = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    tokenizer = BPETokenizer.train(counts, 256 + 3 + 1)
    assert tokenizer.merges == [("u", "g"), ("u", "n"), ("h", "ug")]
    assert [tokenizer.decode([i]) for i in range(256, 260)] == ["ug", "un", "hug", END_OF_TEXT]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("hugs bug mug")] == [
        "hug", "s", " ", "b", "ug", " ", "m", "ug"
    ]  # fmt: skip
    texts = [word for word, n in counts.items() for _ in range(n)]
    random.Random(0).shuffle(texts)
    assert BPETokenizer.train(texts, 260).merges == tokenizer.merges


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@settings(deadline=None, max_examples=150)
@given(text=TRICKY)
def test_bytes_come_back_exactly(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.eos_id not in ids


@pytest.fixture(scope="module")
def rust(tokenizers):
    return {kind: byte_level(tokenizers[kind].vocab, tokenizers[kind].merges) for kind in ("gpt2", "bpe")}


@pytest.mark.parametrize("kind", ["gpt2", "bpe"])
@settings(deadline=None, max_examples=150)
@given(text=TRICKY)
def test_byte_level_bpe_agrees_with_the_tokenizers_library(tokenizers, rust, kind, text):
    assert tokenizers[kind].encode(text) == rust[kind].encode(text).ids


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_streaming_joins_to_decode(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    assert stream.finish() == ""


def test_streaming_holds_back_half_a_character():
    tokenizer = BPETokenizer.from_merges([])  # one token per byte
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("a🎭é")] == ["a", "", "", "", "🎭", "", "é"]
    assert stream.push(tokenizer.encode("日")[0]) == ""
    assert stream.finish() == "\ufffd"


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_are_refused(tokenizers, kind):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83C at position 2.*repair"):
        tokenizers[kind].encode("ab\ud83c")
    with pytest.raises(TypeError, match="text is bytes; expected str"):
        tokenizers[kind].encode(b"ab")


@pytest.mark.parametrize("kind", ["char", "word", "bpe"])
def test_lone_surrogates_are_refused_in_training(kind):
    with pytest.raises(ValueError, match="lone surrogate"):
        get_tokenizer(kind, ["fine", "not \udc00"])


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "word"])
def test_special_tokens_only_when_allowed(tokenizers, kind):
    tokenizer = tokenizers[kind]
    text = f" all{END_OF_TEXT} all"
    eos = tokenizer.eos_id
    word = tokenizer.encode(" all")
    assert eos not in tokenizer.encode(text)
    assert tokenizer.encode(text, allowed_special="all") == [*word, eos, *word]
    assert tokenizer.encode(text, allowed_special={END_OF_TEXT}) == [*word, eos, *word]
    assert tokenizer.decode([*word, eos, *word]) == text
    with pytest.raises(ValueError, match=r"allowed_special names '<pad>'; this tokenizer has '<|endoftext|>'"):
        tokenizer.encode(text, allowed_special=["<pad>"])
    with pytest.raises(TypeError, match="expected a collection of names"):
        tokenizer.encode(text, allowed_special=END_OF_TEXT)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [-1, 10**6])
def test_ids_outside_the_vocabulary(tokenizers, kind, bad):
    with pytest.raises(ValueError, match=f"id {bad} has no token; ids run from 0 to"):
        tokenizers[kind].decode([0, bad])


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tokenizers, kind, tmp_path):
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path)
    for loaded in (load_tokenizer(tmp_path), type(tokenizer).load(tmp_path)):
        assert loaded.kind == tokenizer.kind
        assert loaded.encode(POEM) == tokenizer.encode(POEM)
        assert (loaded.vocab_size, loaded.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
        assert loaded.decode(range(loaded.vocab_size)) == tokenizer.decode(range(loaded.vocab_size))


@pytest.mark.parametrize("first", ["char", "bpe"])
def test_the_last_saved_tokenizer_counts(tokenizers, first, tmp_path):
    second = "bpe" if first == "char" else "char"
    tokenizers[first].save(tmp_path)
    tokenizers[second].save(tmp_path)
    assert load_tokenizer(tmp_path).encode(POEM) == tokenizers[second].encode(POEM)


def test_char(tokenizers):
    tokenizer = tokenizers["char"]
    assert tokenizer.tokens == sorted(set(POEM))
    assert tokenizer.eos_id is None
    assert tokenizer.decode(tokenizer.encode(POEM)) == POEM
    with pytest.raises(ValueError, match=r"'Ω' \(U\+03A9\) at position 3, which is not among the \d+ characters"):
        tokenizer.encode("dayΩ")
    with pytest.raises(ValueError, match="this tokenizer has no special tokens"):
        tokenizer.encode("day", allowed_special=[END_OF_TEXT])
    with pytest.raises(ValueError, match="is empty"):
        CharTokenizer.train("")


def test_word(tokenizers):
    tokenizer = tokenizers["word"]
    assert tokenizer.decode(tokenizer.encode(POEM)) == POEM
    assert [tokenizer.decode([i]) for i in tokenizer.encode(" summer's lease")] == [" summer's", " lease"]
    assert tokenizer.decode(tokenizer.encode("Shall I compare a zebra?")) == "Shall I compare a <|unk|>?"
    assert tokenizer.encode("zebra") == [tokenizer.unk_id]
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.unk_id]) == "<|endoftext|><|unk|>"


@settings(deadline=None)
@given(text=TRICKY.filter(bool))
def test_word_round_trip_of_known_text(text):
    tokenizer = WordTokenizer.train(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_word_vocabulary_is_capped_at_the_most_frequent():
    tokenizer = WordTokenizer.train("b b b a a a c c d", vocab_size=5)
    assert tokenizer.tokens == [" a", " b", " c", END_OF_TEXT, "<|unk|>"]
    assert tokenizer.vocab_size == 5


def test_bpe_training_is_repeatable_and_honest_about_its_size():
    assert BPETokenizer.train(POEM * 2, 500).merges == BPETokenizer.train([POEM, POEM], 500).merges
    assert BPETokenizer.train("ab ab cd", 1000).vocab_size == 256 + 1 + 1  # only "ab" occurs twice


def test_vocabulary_whose_ids_do_not_follow_the_merges(tokenizers, tmp_path):
    """As in RoBERTa: same merges, ids in another order, further special tokens."""
    ours = tokenizers["bpe"]
    names = sorted(ours.vocab)
    random.Random(1).shuffle(names)
    vocab = {token: i + 3 for i, token in enumerate(["<s>", *names, "</s>"])}  # 0, 1 and 2 stay without a token
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, ours.merges)]))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 1000}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>"}}')
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode(POEM) == byte_level(vocab, ours.merges).encode(POEM).ids
    assert loaded.decode(loaded.encode(POEM)) == POEM
    assert loaded.eos_id == vocab["</s>"]
    assert loaded.vocab_size == 1001
    assert loaded.encode("a<pad>", allowed_special="all")[-1] == 1000
    with pytest.raises(ValueError, match="id 1 has no token"):
        loaded.decode([1])
    loaded.save(tmp_path / "again")
    assert load_tokenizer(tmp_path / "again").vocab == loaded.vocab


def test_a_token_that_two_merges_make():
    merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("ab", "c"), ("x", "y")]
    ours = BPETokenizer.from_merges(merges)
    assert ours.vocab_size == 256 + 4 + 1
    for text in ("abc", "xyabcab", "babcx"):
        assert ours.encode(text) == byte_level(ours.vocab, merges).encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "bpe", "openai-gpt"])
def test_transformers_reads_ours_and_we_read_theirs(tokenizers, kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = tokenizers[kind]
    ours.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = POEM + "  Don't\n\n\nstop -- zebra's 100% \u00a0 ÉCOLE <|endoftext"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert theirs.decode(ours.encode(text), clean_up_tokenization_spaces=False) == ours.decode(ours.encode(text))
    assert theirs.eos_token_id == ours.eos_id
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_tokenizer(tmp_path / "theirs")
    assert back.encode(text) == ours.encode(text)
    assert (back.vocab_size, back.eos_id) == (ours.vocab_size, ours.eos_id)


def test_gpt1_lower_cases_and_closes_words(tokenizers):
    tokenizer = tokenizers["openai-gpt"]
    ids = tokenizer.encode("Summer's  DAY?\n")
    assert tokenizer.decode(ids) == "summer ' s day ?"
    assert tokenizer.eos_id is None
    assert tokenizer.encode("Ж") == [tokenizer.vocab["<unk>"]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.json", "{", "vocab.json is not valid JSON"),
        ("vocab.json", "[1]", r"vocab.json: the content is a list of 1; expected an object"),
        ("vocab.json", '{"a": "0"}', r'vocab.json: the id of "a" is "0"; expected a whole number'),
        ("vocab.json", '{"a": -1}', r'vocab.json: the id of "a" is -1; expected 0 to 2147483646'),
        ("vocab.json", '{"a": true}', r'vocab.json: the id of "a" is true; expected a whole number'),
        ("vocab.json", '{"a": 0}', "vocab lacks 366 tokens, the first '!'"),
        ("merges.txt", "#version: 0.2\na b c\n", "merges.txt: line 2 is 'a b c'; expected two tokens"),
        ("merges.txt", "a \u4e00\n", "'一', which stands for no byte"),
        ("merges.txt", "", "merges.txt is empty"),
        ("tokenizer.json", '{"kind": "morse"}', "kind is 'morse'; expected 'char' or 'word'"),
        ("tokenizer.json", '{"kind": "char", "version": 2}', "version is 2; expected 1"),
        (
            "tokenizer.json",
            '{"kind": "char", "version": 1, "tokens": [1]}',
            r"tokenizer.json: tokens\[0\] is 1; expected a text",
        ),
        ("tokenizer.json", '{"kind": "char", "version": 1, "tokens": ["a", "a"]}', "repeats 'a'"),
        ("tokenizer.json", '{"kind": "word", "version": 1, "tokens": ["a"]}', "has no '<|endoftext|>'"),
    ],
)
def test_damaged_files(tokenizers, tmp_path, name, content, message):
    tokenizers["bpe"].save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "openai-gpt"])
def test_a_folder_is_read_once(tokenizers, kind, tmp_path, monkeypatch):
    from gptfast.tokenizer import hf_files

    tokenizers[kind].save(tmp_path)
    reads, read = [], hf_files._read_files
    monkeypatch.setattr(hf_files, "_read_files", lambda folder: reads.append(folder) or read(folder))
    load_tokenizer(tmp_path)
    assert reads == [tmp_path]


def test_two_tokens_with_one_id(tokenizers):
    vocab = {**tokenizers["bpe"].vocab, "extra": 0}
    with pytest.raises(ValueError, match="gives two tokens one id"):
        BPETokenizer(vocab, tokenizers["bpe"].merges)


def test_tokenizers_of_another_kind(tokenizers, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match="is not a tokenizer that gptfast supports"):
        load_tokenizer(tmp_path)
    tokenizers["openai-gpt"].save(tmp_path)
    with pytest.raises(ValueError, match="holds the vocabulary of GPT-1"):
        BPETokenizer.load(tmp_path)
    tokenizers["char"].save(tmp_path)
    with pytest.raises(ValueError, match="kind is 'char'; expected 'word'"):
        WordTokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="has no '<unk>'"):
        OpenAIGPTTokenizer({"a</w>": 0}, [])
    with pytest.raises(ValueError, match="belong to different tokenizers"):
        OpenAIGPTTokenizer({"<unk>": 0}, [("a", "b</w>")])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: get_tokenizer("char"), ValueError, "'char' is trained on text, but text is None"),
        (
            lambda: get_tokenizer("gpt2", vocab_size=9),
            ValueError,
            "vocab_size is 9, but the size of 'gpt2' is given",
        ),
        (lambda: get_tokenizer("bpe", "text", 256), ValueError, "vocab_size is 256; expected at least 257"),
        (lambda: get_tokenizer("word", "text", 2), ValueError, "vocab_size is 2; expected at least 3"),
        (lambda: get_tokenizer("word", ""), ValueError, "texts have no words"),
        (
            lambda: get_tokenizer("gtp2"),
            FileNotFoundError,
            "'gtp2' is neither 'gpt2' nor a folder; name one of",
        ),
    ],
)
def test_get_tokenizer_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*; expected tokenizer.json, or vocab.json"):
        load_tokenizer(tmp_path)
