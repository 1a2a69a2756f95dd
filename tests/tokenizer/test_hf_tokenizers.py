"""Tokenizer folders of others: the ids of transformers' AutoTokenizer, setting by setting, or a refusal that names it."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gptfast.data import Document, prepare
from gptfast.tokenizer import BPETokenizer, GPT2Tokenizer, HFTokenizer, StreamDecoder, get_tokenizer, load_tokenizer
from tests.support.texts import POEM, train_gpt1

transformers = pytest.importorskip("transformers")

TEXTS = [
    "Hello world",
    " Hello  world \n\n's",
    "x <mask> y<mask>z  <mask>",
    "a two words b two wordsb",
    "<|endoftext|>Shall I<|endoftext|> compare",
    "<unk> a<unk>b <UNK>",
    "café 日本 🎭 é <|user|>hi<|user|>",
    POEM,
]
MASK = {
    "content": "<mask>",
    "lstrip": False,
    "rstrip": False,
    "single_word": False,
    "normalized": False,
    "special": True,
}


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(POEM * 2, 400)


@pytest.fixture(scope="module")
def gpt1():
    return train_gpt1(POEM)


def add(folder, **settings):
    """Put settings into tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def added(**flags):
    """A token behind the vocabulary of 368."""
    return {"added_tokens_decoder": {"368": {**MASK, **flags}}}


def check(folder, kind=None, again=True):
    """Ours and theirs agree on every text, also streamed, and after our save."""
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text, allowed_special="all")
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), text
        decoder = StreamDecoder(ours)
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == ours.decode(ids)
    assert ours.eos_id == theirs.eos_token_id
    assert kind is None or type(ours) is kind
    if again:
        ours.save(folder / "again")
        check(folder / "again", kind, again=False)
    return ours


SETTINGS = {
    "add_prefix_space": ({"add_prefix_space": True}, HFTokenizer),
    "add_bos_token": ({"add_bos_token": True}, HFTokenizer),
    "add_eos_token": ({"add_eos_token": True, "add_bos_token": True}, HFTokenizer),
    "no ends": ({"add_bos_token": False}, BPETokenizer),
    "special": (added(), BPETokenizer),
    "lstrip": (added(lstrip=True), HFTokenizer),
    "rstrip": (added(rstrip=True), HFTokenizer),
    "single_word": (added(single_word=True), HFTokenizer),
    "not special": (added(special=False, normalized=True), HFTokenizer),
    "of two words": (added(content="two words", special=False), HFTokenizer),
    "a word of the vocabulary": ({"added_tokens_decoder": {"290": {**MASK, "content": None}}}, HFTokenizer),
    "named only": ({"pad_token": "<mask>", "additional_special_tokens": ["<|user|>"]}, BPETokenizer),
    "a named object": ({"mask_token": {**MASK, "lstrip": True, "__type": "AddedToken"}}, HFTokenizer),
    "eos by name": ({**added(), "eos_token": "<mask>"}, BPETokenizer),
    "one begins another": ({"pad_token": "<mask", "mask_token": "<mask>"}, HFTokenizer),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_vocab_and_merges(bpe, tmp_path, name):
    settings, kind = json.loads(json.dumps(SETTINGS[name][0])), SETTINGS[name][1]
    for i, token in settings.get("added_tokens_decoder", {}).items():
        token["content"] = token["content"] or next(t for t, n in bpe.vocab.items() if n == int(i))
    bpe.save(tmp_path)
    add(tmp_path, **settings)
    check(tmp_path, kind)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "a word of the vocabulary"])
def test_settings_in_the_files_that_transformers_saves(bpe, tmp_path, name):
    """tokenizer.json and its companions."""
    settings = SETTINGS[name][0]
    bpe.save(tmp_path / "slow")
    add(tmp_path / "slow", **settings)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "slow").save_pretrained(tmp_path / "fast")
    assert (tmp_path / "fast/tokenizer.json").exists()
    check(tmp_path / "fast")


@pytest.mark.parametrize("kind", ["bpe", "gpt1"])
def test_what_transformers_saves_again_stays_as_fast(kind, bpe, gpt1, tmp_path):
    """Its template adds no token: texts are still encoded in pieces, and by tiktoken."""
    ours = bpe if kind == "bpe" else gpt1
    ours.save(tmp_path / "slow")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "slow").save_pretrained(tmp_path / "fast")
    spec = json.loads((tmp_path / "fast/tokenizer.json").read_text())
    if kind == "bpe":
        assert spec["post_processor"]["type"] == "TemplateProcessing"
    check(tmp_path / "fast", type(ours))


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("flags", [{"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}])
def test_the_ends_of_tokenizer_json_count_before_settings(bpe, tmp_path, template, flags):
    bpe.save(tmp_path / "slow")
    add(tmp_path / "slow", add_bos_token=template)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "slow").save_pretrained(tmp_path / "fast")
    add(tmp_path / "fast", **flags)
    ours = check(tmp_path / "fast", HFTokenizer if template else BPETokenizer)
    assert ours.encode("x", "all") == [*([ours.eos_id] if template else []), *bpe.encode("x")]


def test_tokenizer_json_counts_before_vocab_and_merges(bpe, tmp_path):
    bpe.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_tokens(["<|user|>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    bpe.save(tmp_path / "old")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tmp_path / "old" / name).read_bytes())
    ours = check(tmp_path)
    assert ours.encode("<|user|>", allowed_special="all") == [368]


def test_special_tokens_are_ordinary_text_unless_allowed(bpe, tmp_path):
    bpe.save(tmp_path)
    add(tmp_path, **added(lstrip=True), pad_token="<|pad|>")
    ours = load_tokenizer(tmp_path)
    assert ours.encode("a <mask><|pad|>") == bpe.encode("a <mask><|pad|>")
    assert ours.encode("a <mask><|pad|>", ["<mask>"]) == [*bpe.encode("a"), 368, *bpe.encode("<|pad|>")]
    assert ours.encode("a <mask><|pad|>", "all") == [*bpe.encode("a"), 368, 369]
    with pytest.raises(ValueError, match="allowed_special names '<x>'; this tokenizer has"):
        ours.encode("a", ["<x>"])
    with pytest.raises(ValueError, match="id 370 has no token"):
        ours.decode([370])


def test_gpt1_finds_unk_and_added_tokens(gpt1, tmp_path):
    gpt1.save(tmp_path)
    ours = check(tmp_path, type(gpt1))
    assert ours.encode("<unk>", "all") == [ours.vocab["<unk>"]] != ours.encode("<unk>")
    add(tmp_path, pad_token="<pad>", additional_special_tokens=["_start_", "<|user|>"])
    check(tmp_path, HFTokenizer)


def test_gpt2_keeps_the_settings_it_came_with(tmp_path):
    GPT2Tokenizer().save(tmp_path)
    add(tmp_path, pad_token="<|endoftext|>", model_max_length=77, chat_template="{{ x }}")
    load_tokenizer(tmp_path).save(tmp_path / "b")
    config = json.loads((tmp_path / "b/tokenizer_config.json").read_text())
    assert (config["pad_token"], config["model_max_length"], config["chat_template"]) == (
        "<|endoftext|>",
        77,
        "{{ x }}",
    )


def test_merges_that_were_cut_short(bpe, gpt1, tmp_path):
    for tokenizer in (bpe, gpt1):
        tokenizer.save(tmp_path)
        lines = (tmp_path / "merges.txt").read_text().splitlines(keepends=True)
        (tmp_path / "merges.txt").write_text("".join(lines[: len(lines) // 2]))
        with pytest.raises(
            ValueError, match=r"merges.txt: no merge makes \d+ tokens of vocab.json, such as '.+'; it is cut"
        ):
            load_tokenizer(tmp_path)


def test_files_that_disagree(bpe, tmp_path):
    bpe.save(tmp_path)
    add(tmp_path, added_tokens_decoder={"360": {**MASK}})
    with pytest.raises(ValueError, match="gives two tokens one id"):
        load_tokenizer(tmp_path)
    add(tmp_path, added_tokens_decoder={"5": {**MASK, "content": "a"}})
    with pytest.raises(ValueError, match="the id of 'a' is 5, but another file"):
        load_tokenizer(tmp_path)
    add(tmp_path, added_tokens_decoder={"five": MASK})
    with pytest.raises(ValueError, match="added_tokens_decoder has 'five'; expected ids"):
        load_tokenizer(tmp_path)
    bpe.save(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    add(tmp_path, add_prefix_space=True)
    with pytest.raises(
        ValueError, match=r"add_prefix_space is True by tokenizer_config.json and False in tokenizer.json"
    ):
        load_tokenizer(tmp_path)


def test_prepare_encodes_whole_texts(bpe, tmp_path, monkeypatch):
    bpe.save(tmp_path / "t")
    add(tmp_path / "t", add_prefix_space=True, add_bos_token=True)
    ours = load_tokenizer(tmp_path / "t")
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "texts" / name).write_text(POEM * 9)
    monkeypatch.setattr(Document.blocks, "__defaults__", (50,))
    data = prepare(tmp_path / "texts", tmp_path / "t", tmp_path / "out", val_fraction=0.5)
    ids = ours.encode(POEM * 9)
    assert data.train.take(np.arange(len(ids))).tolist() == ids


def test_one_rule_for_prompts(bpe):
    from gptfast.batch import _read_job
    from gptfast.serving.protocol import Completion

    text = "a<|endoftext|>b"
    with_special, without = bpe.encode(text, "all"), bpe.encode(text)
    assert with_special != without
    ask = Completion(model="m", prompt=[text])
    assert ask.prompts(bpe) == [with_special] and ask.prompts(bpe, False) == [without]

    class Model:
        class config:
            vocab_size, block_size = 1000, 100

    for special, ids in ((True, with_special), (False, without)):
        assert _read_job(1, json.dumps(text), Model, bpe, {}, {}, special).ids == ids


@pytest.mark.parametrize("unk", [False, True])
def test_transformers_reads_characters(tmp_path, unk):
    ours = get_tokenizer("char", POEM, unk=unk)
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as beside a model
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    back = load_tokenizer(tmp_path)
    assert back.tokens == ours.tokens and type(back) is type(ours)
    for text in (POEM, "Shall  I\n\n ,", "\t café 日本 🎭 "):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] == back.encode(text)
        assert theirs.decode(ids) == ours.decode(ids) == text
    assert theirs.eos_token_id is None
    if unk:
        assert ours.encode("Ж a<|unk|>", "all") == theirs("Ж a<|unk|>")["input_ids"]
        assert ours.decode(ours.encode("aЖ")) == "a<|unk|>"
    else:
        with pytest.raises(ValueError, match=r"get_tokenizer\('char', text, unk=True\)"):
            ours.encode("Ж")


def test_characters_as_they_were_saved_before(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"kind": "char", "version": 1, "tokens": ["a", "b"]}')
    assert load_tokenizer(tmp_path).encode("ab") == [0, 1]


WORDS = (
    POEM + "zebra o'er o\u2019er  x² e\u0301 “Hi” \x1c -- [a] ^b\\ 👩\u200d👧\nTo be\n" + "w" * 150 + " " + "v" * 150
)


@pytest.mark.parametrize("blank", [True, False])
def test_transformers_reads_words(tmp_path, blank):
    """Also where a word is known only without the space before it, and where it is not known at all."""
    text = WORDS if blank else "a-b\nb\n" + "c c"
    ours = get_tokenizer("word", text)
    assert (" " in ours.tokens) == blank
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')  # as beside a model
    theirs, back = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert back.tokens == ours.tokens and type(back) is type(ours)
    words = [*text.split(), "nowhere", "zebras", "zebra's", "o'", "'", "Ж", "«", "日本語", "To", "\n", "", "w" * 149]
    texts = [text, " ".join(words), "\n".join(words), *(f" {word}" for word in words), *words]
    for case in [*texts, "a <|endoftext|> b<|unk|>"]:
        ids = ours.encode(case, "all")
        assert ids == theirs(case)["input_ids"] == back.encode(case, "all"), case
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False), case
    assert ours.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == ours.eos_id and theirs.unk_token_id == ours.unk_id


def test_words_as_they_were_saved_before(tmp_path):
    old = {"kind": "word", "version": 1, "tokens": ["a", " a", "<|endoftext|>", "<|unk|>"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(old))
    assert load_tokenizer(tmp_path).encode("a a b") == [0, 1, 3]


def test_a_large_word_vocabulary(tmp_path):
    """Every checkpoint saves it: its pattern is a tree, small and made once."""
    words = [f"{first}{middle}{last}" for first in "abcdefghij" for middle in range(20) for last in "klmnopqrst"]
    ours = get_tokenizer("word", " ".join(words) + "  .")
    ours.save(tmp_path)
    pattern = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]["pattern"]["Regex"]
    assert len(pattern) < 3 * len(words)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = " ".join(words[::-1]) + " a0 a0kk"
    assert ours.encode(text) == theirs(text)["input_ids"]
