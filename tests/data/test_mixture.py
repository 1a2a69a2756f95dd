"""Mixtures: files of sources, the order of their rows, and training on them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptfast.data import Mixture, MixtureSampler, load_prepared, open_data, prepare, write_tokens
from gptfast.data.mixture import read_mixture
from tests.support.train_command import SCHEDULE, SMALL, _argv, _threads, gptfast  # noqa: F401

GPT3 = (60, 22, 8, 8, 3)  # Brown et al., arXiv 2005.14165, table 2.2: sums to 101
FILE = """[[source]]
name = "plays"
data = "plays.txt"
weight = 3

[[source]]
name = "poems"
data = "poems"
weight = 1
"""


def mixture_of(tmp_path: Path, shares=GPT3) -> Mixture:
    files = [write_tokens(tmp_path / f"{k}.bin", [np.full(600 + 100 * k, k)], 10) for k in range(len(shares))]
    return Mixture(tuple("abcde"), tuple(files), tuple(share / sum(shares) for share in shares))


def test_every_source_has_its_share_and_reads_its_rows_in_turn(tmp_path: Path):
    mixture = mixture_of(tmp_path)
    sampler = MixtureSampler(mixture, 16, 8, seed=3)
    rows = 5 * 4096
    sources, numbers = sampler.places(np.arange(rows))
    for k, share in enumerate(mixture.shares):
        assert abs((sources == k).sum() - rows * share) < 1
        assert (np.sort(numbers[sources == k]) == np.arange((sources == k).sum())).all()
    assert (sources[:4096] != sources[4096:8192]).any()
    for first, count in ((0, 10), (4090, 20), (9999, 3)):
        parts = sampler.places(np.arange(first, first + count))
        assert (parts[0] == sources[first : first + count]).all() and (parts[1] == numbers[first : first + count]).all()


def test_batches_hold_the_sources_and_do_not_depend_on_their_size(tmp_path: Path):
    mixture = mixture_of(tmp_path)
    x, y = MixtureSampler(mixture, 16, 12, seed=3).batch_from(40)
    sources, _ = MixtureSampler(mixture, 16, 12, seed=3).places(np.arange(40, 52))
    assert x.shape == y.shape == (12, 16) and (x[:, 0].numpy() == sources).all()
    for part in range(3):
        assert (MixtureSampler(mixture, 16, 4, seed=3).batch_from(40 + 4 * part)[0] == x[4 * part : 4 * part + 4]).all()
    assert not (MixtureSampler(mixture, 16, 12, seed=4).batch_from(40)[0] == x).all()
    assert mixture.epochs(101 * 36, 16)[0] == pytest.approx(60)  # 584 // 16 windows
    with pytest.raises(ValueError, match=r"source a: .*600 tokens"):
        MixtureSampler(mixture, 1000, 1)


def test_a_rare_source_has_a_row_in_every_block(tmp_path: Path):
    sampler = MixtureSampler(mixture_of(tmp_path, (20_000, 1)), 16, 8)
    sources, numbers = sampler.places(np.arange(3 * 20_001))
    assert np.sort(numbers[sources == 1]).tolist() == [0, 1, 2]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "plays.txt").write_text("Is this a dagger which I see before me?\n" * 60)
    (tmp_path / "poems").mkdir()
    for n in range(4):
        (tmp_path / "poems" / f"{n}.txt").write_text("Shall I compare thee to a summer's day? 'Tis zero.\n" * 20)
    (tmp_path / "mix.toml").write_text(FILE)
    return tmp_path / "mix.toml"


def test_sources_share_a_tokenizer_learnt_from_all_of_them(file: Path, tmp_path: Path):
    data = open_data(file, tmp_path / "out", "char")
    assert isinstance(data.train, Mixture) and data.train.shares == (0.75, 0.25)
    assert data.tokenizer.decode(data.tokenizer.encode("'Tis a dagger?")) == "'Tis a dagger?"
    text = data.tokenizer.decode(data.val.tokens.tolist())
    assert "dagger" in text and "summer" in text and len(data.val.document_starts) >= 2
    before = (tmp_path / "out" / "val.bin").stat().st_mtime_ns
    again = open_data(file, tmp_path / "out", "char")
    assert (tmp_path / "out" / "val.bin").stat().st_mtime_ns == before and len(again.train) == len(data.train)


def test_prepared_sources_keep_their_tokenizer_and_must_agree(file: Path, tmp_path: Path):
    text = (tmp_path / "plays.txt").read_text() + (tmp_path / "poems" / "0.txt").read_text()
    (tmp_path / "both.txt").write_text(text)
    prepare(tmp_path / "both.txt", "char", tmp_path / "both")
    file.write_text(FILE.replace("plays.txt", "both"))
    data = open_data(file, tmp_path / "out")
    assert data.tokenizer.files() == load_prepared(tmp_path / "both").tokenizer.files()
    prepare(tmp_path / "plays.txt", "char", tmp_path / "other")
    file.write_text(FILE.replace("plays.txt", "both").replace('"poems"\nweight', '"other"\nweight'))
    with pytest.raises(ValueError, match=r"mix.toml: source poems has another tokenizer"):
        open_data(file, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weight = 3", "weight = -1", "source plays: weight is -1; expected a finite number above 0"),
        ("weight = 3", "weight = 0", "source plays: weight is 0"),
        ("weight = 3", "weight = nan", "source plays: weight is nan"),
        ("weight = 3", "weight = inf", "source plays: weight is inf"),
        ("weight = 3", f"weight = 1{'0' * 400}", "source plays: weight is 1000"),
        ("weight = 3", "weight = 1e-12", "source plays: weight is 1e-12, 1e-12 of all; expected at least a row in 2"),
        ("weight = 3", "", "source plays: weight is missing"),
        ("weight = 3", "weight = '3'", "source plays: weight is '3'; expected a number"),
        ("weight = 3", "weights = 3", "source plays: unknown key weights; did you mean weight"),
        ('poems"\ndata', 'plays"\ndata', "two sources are named plays"),
        ('"plays"', '"a/b"', "source a/b: a name has letters"),
        ('"plays.txt"', '"gone.txt"', "source plays: .*gone.txt does not exist; data is relative"),
        ("[[source]]", "[source]", "not TOML|expected \\[\\[source\\]\\] tables"),
    ],
)
def test_a_file_of_sources_names_what_is_wrong(file: Path, old: str, new: str, message: str):
    file.write_text(FILE.replace(old, new))
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        read_mixture(file)


def test_a_run_on_a_mixture_resumes_to_the_bit_and_shows_its_sources(file: Path, tmp_path: Path, capsys):
    options = [*SMALL, *SCHEDULE, "--data", file, "--tokenizer", "char"]
    assert gptfast("train", *options, "--out", tmp_path / "whole") == 0
    shown = capsys.readouterr().out
    assert re.search(r"75.0% plays: [\d,]+ tokens, [\d.]+ epochs in all", shown) and "25.0% poems: " in shown
    assert gptfast("train", *options, "--out", tmp_path / "parts", "--max-steps", "6", "--lr-decay-steps", "12") == 0
    file.write_text(FILE.replace("weight = 3", "weight = 6"))
    resume = ["--out", tmp_path / "parts", "--resume", "--max-steps", "12"]
    assert gptfast("train", *resume) == 1
    assert "the data is not what" in capsys.readouterr().err
    file.write_text(FILE)
    assert gptfast("train", *resume) == 0
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def trained(file: Path, out: Path) -> list:
    """A run of six of twelve steps on the mixture, and the options that end it."""
    options = [*SMALL, *SCHEDULE, "--data", file, "--tokenizer", "char"]
    assert gptfast("train", *options, "--out", out, "--max-steps", "6", "--lr-decay-steps", "12") == 0
    return ["--out", out, "--resume", "--max-steps", "12"]


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", ["a text", "the weights", "the order", "a source"])
@pytest.mark.parametrize("older", [False, True])
def test_tokens_of_a_mixture_are_not_lost_to_other_ones(file: Path, tmp_path: Path, capsys, change: str, older: bool):
    resume, data = trained(file, tmp_path / "run"), tmp_path / "run" / "data"
    if older:  # a run of before there was this file
        (data / "mixture.json").unlink(missing_ok=True)
    before = content_of(data)
    if change == "a text":
        (tmp_path / "plays.txt").write_text("Is this a dagger which I see before me, or not?\n" * 60)
    elif change == "the weights":
        file.write_text(FILE.replace("weight = 3", "weight = 6"))
    elif change == "the order":
        file.write_text(
            "[[source]]".join(["", *reversed(FILE.split("[[source]]")[1:])]).replace("weight = 3", "weight = 1")
        )
    else:
        (tmp_path / "plays.txt").rename(tmp_path / "others.txt")
        (tmp_path / "plays.txt").write_text("Shall I compare thee to a summer's day? 'Tis a dagger before me.\n" * 60)
    capsys.readouterr()
    assert gptfast("train", *resume) == 1
    assert "the data is not what" in capsys.readouterr().err
    after = content_of(data)
    assert {name: after.get(name) for name in before} == before
    if older:
        return
    assert gptfast("train", *resume, "--data", data) == 0
    assert gptfast("train", *SMALL, *SCHEDULE, "--data", data, "--out", tmp_path / "whole") == 0
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("gone", ["mix.toml", "plays.txt"])
def test_a_run_on_a_mixture_goes_on_where_its_texts_are_gone(file: Path, tmp_path: Path, capsys, gone: str):
    resume = trained(file, tmp_path / "run")
    (tmp_path / gone).unlink()
    capsys.readouterr()
    assert gptfast("train", *resume) == 0
    what = str(file) if gone == "mix.toml" else f"a source of {file}"
    assert f"{what} is no longer there; its tokens are in" in " ".join(capsys.readouterr().out.split())


def test_a_mixture_is_opened_again_from_its_tokens(file: Path, tmp_path: Path):
    data = open_data(file, tmp_path / "out", "char")
    again = open_data(tmp_path / "out", tmp_path / "unused")
    assert (again.train.names, again.train.shares) == (data.train.names, data.train.shares)
    assert [f.tokens.tolist() for f in again.train.files] == [f.tokens.tolist() for f in data.train.files]
    assert again.val.tokens.tolist() == data.val.tokens.tolist() and again.notes == data.notes
    assert again.tokenizer.files() == data.tokenizer.files()
    with pytest.raises(ValueError, match="holds tokens and their tokenizer; leave tokenizer and vocab_size out"):
        open_data(tmp_path / "out", tmp_path / "unused", "char")
    kept = (tmp_path / "out" / "mixture.json").read_text()
    (tmp_path / "out" / "mixture.json").write_text(kept.replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match=r"mixture.json: version is 2; expected 1 - update gptfast"):
        open_data(tmp_path / "out", tmp_path / "unused")
    (tmp_path / "out" / "mixture.json").write_text(kept)
    file.write_text(FILE.replace("plays.txt", "out"))
    with pytest.raises(ValueError, match=r"source plays is a mixture itself; list the sources of .*out here"):
        open_data(file, tmp_path / "other", "char")


def test_a_source_that_cannot_be_read_is_named(file: Path, tmp_path: Path):
    (tmp_path / "plays.txt").write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(ValueError, match=r"mix.toml: source plays: "):
        open_data(file, tmp_path / "out", "char")
    with pytest.raises(ValueError, match=r"is a mixture; give glob and text_field in its"):
        open_data(file, tmp_path / "out", "char", glob="*.md")


def test_the_example_has_the_weights_of_gpt3(tmp_path: Path):
    path = tmp_path / "mixture.toml"
    path.write_text((Path(__file__).parents[2] / "examples" / "gpt3-mixture.toml").read_text())
    names = ("common-crawl", "webtext2", "books1", "books2", "wikipedia")
    for name in names:
        (tmp_path / name).mkdir()
    sources = read_mixture(path)
    assert tuple(source.name for source in sources) == names
    assert [source.share * 101 for source in sources] == pytest.approx(GPT3)
