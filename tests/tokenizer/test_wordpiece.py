"""WordPiece against transformers' BertTokenizer: ids, decoding, files both ways, and training that repeats."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from gptfast.data import prepare
from gptfast.tokenizer import StreamDecoder, WordPieceTokenizer, get_tokenizer, has_tokenizer, lenient, load_tokenizer
from gptfast.tokenizer.extended import with_special_tokens

transformers = pytest.importorskip("transformers")

TEXT = (
    "The quick brown foxes jumped over the lazy dogs, didn't they?\nThe dogs weren't quick; foxes were. Élan 东西 naïve!\n"
    * 8
)
HARD = "The QUICK foxes' élan: 东西\n\n jumped. [MASK]unseen [SEP] \u00e9\u0301 \ufffd don't"


@pytest.fixture(scope="module")
def trained() -> WordPieceTokenizer:
    found = get_tokenizer("wordpiece", TEXT, 90)
    assert isinstance(found, WordPieceTokenizer)
    return found


@pytest.mark.parametrize("lowercase", [True, False])
def test_ids_text_and_files_are_those_of_transformers(lowercase: bool, tmp_path: Path):
    ours = WordPieceTokenizer.train(TEXT, 110, lowercase)
    ours.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert type(theirs).__name__.startswith("Bert")
    wanted = theirs(HARD, add_special_tokens=False)["input_ids"]
    assert ours.encode(HARD, allowed_special="all") == wanted
    assert ours.decode(wanted) == theirs.decode(wanted)
    assert ours.special_id("mask_token") in wanted and ours.special_id("mask_token") not in ours.encode(HARD)
    theirs.save_pretrained(tmp_path / "theirs")
    assert has_tokenizer(tmp_path / "ours") and has_tokenizer(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        again = load_tokenizer(tmp_path / folder)
        assert isinstance(again, WordPieceTokenizer) and again.vocab == ours.vocab and again.eos_id == ours.eos_id
        assert again.encode(HARD, allowed_special="all") == wanted
        (tmp_path / folder / "tokenizer.json").unlink()
    vocab = load_tokenizer(tmp_path / "ours")  # vocab.txt and the settings alone, as the first BERTs have them
    assert vocab.encode(HARD, allowed_special="all") == wanted


def test_training_gives_the_same_pieces_in_another_process(trained: WordPieceTokenizer):
    code = f"from gptfast.tokenizer import get_tokenizer; print(sorted(get_tokenizer('wordpiece', {TEXT!r}, 90).vocab.items()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == str(sorted(trained.vocab.items()))
    assert trained.vocab_size == 90 and list(trained.vocab)[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert any(trained.continues(i) and len(token) > 3 for token, i in trained.vocab.items())


def test_pieces_of_a_text_a_stream_and_prepared_data(trained: WordPieceTokenizer, tmp_path: Path):
    ids = trained.encode(TEXT)
    stream = StreamDecoder(trained)
    shown = "".join(stream.push(i) for i in ids) + stream.finish()
    assert shown.split()[:4] == ["the", "quick", "brown", "foxes"] and shown == trained.decode(ids)
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    data = prepare(tmp_path / "text.txt", "wordpiece", tmp_path / "data", vocab_size=90, progress=False)
    assert data.tokenizer.kind == "wordpiece" and data.train.eos_id == data.tokenizer.eos_id
    assert data.train.tokens[: len(ids)].tolist() == data.tokenizer.encode(TEXT)
    more = with_special_tokens(trained, {"[NEW]": 90})
    assert more.encode("[NEW]", allowed_special="all") == [90] and isinstance(more, WordPieceTokenizer)


def test_a_stream_of_any_tokens_is_their_text(trained: WordPieceTokenizer, tmp_path: Path):
    (tmp_path / "vocab.txt").write_text("\n".join([*trained.vocab, "##!", "##'m", "##n't"]) + "\n", encoding="utf-8")
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(0)
    assert tokenizer.kind == "wordpiece" and tokenizer.vocab_size == 93
    for soft in (tokenizer, lenient(tokenizer)):
        for _ in range(200):
            ids = [rng.randrange(93) for _ in range(rng.randrange(12))]
            stream = StreamDecoder(soft)
            assert "".join(stream.push(i) for i in ids) + stream.finish() == soft.decode(ids)
    stream = StreamDecoder(lenient(tokenizer))
    assert stream.push(1000) + stream.push(4) + stream.finish() == "[MASK]", "an id without a token has no text"


def test_bad_files_and_sizes(trained: WordPieceTokenizer, tmp_path: Path):
    with pytest.raises(ValueError, match="vocab_size is 5; expected more than the 5 special"):
        get_tokenizer("wordpiece", TEXT, 5)
    with pytest.raises(ValueError, match="id 90 has no token"):
        trained.decode([90])
    with pytest.raises(ValueError, match="surrogate"):
        trained.encode("\ud800")
    trained.save(tmp_path)
    fast = json.loads((tmp_path / "tokenizer.json").read_text())
    fast["model"]["vocab"]["the"] = -1
    (tmp_path / "tokenizer.json").write_text(json.dumps(fast))
    with pytest.raises(ValueError, match="the id of 'the' is -1"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.txt").write_text("a\nb\na\n[UNK]\n")
    with pytest.raises(ValueError, match="'a' stands on two lines"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"has no \[UNK\]"):
        load_tokenizer(tmp_path)
