"""`gptfast train --objective mlm`: it learns, resumes to the same bits, and refuses what does not go with it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gptfast.models import BERT, GPT, GPTConfig
from gptfast.tokenizer import load_tokenizer
from gptfast.training.config import TrainConfig
from gptfast.training.launch import new_run, resumed_run
from gptfast.training.masked_language_modelling import MaskedLanguageModelling
from gptfast.training.trainer import Trainer
from tests.support.processes import finish, ranks
from tests.support.train_command import gptfast

SHAPE = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "dropout": 0.1}
OPTIONS = {
    **{"objective": "mlm", "vocab_size": 60, "batch_size": 8, "dtype": "float32", "eval_every": 10, "eval_batches": 2},
    **{"learning_rate": 3e-3, "min_lr": 3e-3, "warmup_steps": 4, **SHAPE},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    subjects, verbs = ("the fox", "a dog", "the cat", "one bird"), ("sees", "hears", "likes", "finds")
    draw = np.random.default_rng(0)
    lines = [f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(subjects)} at home." for _ in range(1200)]
    for n in range(4):
        (folder / f"{n}.txt").write_text("\n".join(lines[n::4]))
    return folder


def run(text: Path, out: Path, steps: int, **options):
    ready = new_run({**OPTIONS, "data": str(text), "out": out, "max_steps": steps, **options})
    return ready, ready.trainer.train()


def same(one: Path, two: Path) -> bool:
    files = [load_file(folder / "last/model.safetensors") for folder in (one, two)]
    return all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_it_learns_resumes_to_the_same_bits_and_fills_masks(text: Path, tmp_path: Path):
    ready, result = run(text, tmp_path / "one", 30)
    assert result.best_val_loss < 4.1  # ln 60 + ln 2 at the start: 4.8
    run(text, tmp_path / "two", 13)
    resumed_run({"out": tmp_path / "two", "max_steps": 30}).trainer.train()
    assert same(tmp_path / "one", tmp_path / "two")
    records = [json.loads(line) for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    last = records[-1]
    assert last["val_loss"] == pytest.approx(last["val_mlm_loss"] + last["val_nsp_loss"])
    assert last["loss"] == pytest.approx(last["mlm_loss"] + last["nsp_loss"])
    assert 0 < last["val_mlm_accuracy"] < 1 and 0 < last["val_nsp_accuracy"] < 1
    model = BERT.from_pretrained(tmp_path / "one/best")
    found = model.fill_mask("the fox sees the cat at [MASK].", top_k=2)
    assert len(found) == 2 and found[0]["sequence"] == f"the fox sees the cat at {found[0]['token_str']}.".replace(
        " .", "."
    )
    masks = [batch["labels"] for batch in ready.trainer.objective.batches(8, ready.trainer.config)]
    assert len(masks) == 1 and masks[0].shape == (8, 32)


def test_accumulated_passes_have_the_gradient_of_one(text: Path, tmp_path: Path):
    """One step of 8 rows, and of 2 passes of 4: the targets of all count the same, whichever pass they are in."""
    run(text, tmp_path / "one", 1, dropout=0.0)
    run(text, tmp_path / "two", 1, dropout=0.0, batch_size=4, grad_accum=2, eval_batches=4)
    one, two = (load_file(tmp_path / name / "last/optimizer.safetensors") for name in ("one", "two"))
    moments = [name for name in one if name.startswith("exp_avg/")]
    assert moments
    for name in moments:  # the first moment is a tenth of the gradient; measured: 1e-8
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_every_number_of_processes_has_the_losses_of_one(text: Path, tmp_path: Path):
    names = {name: value for name, value in OPTIONS.items() if name != "batch_size"} | {"device": "cpu", "threads": 1}
    options = [part for name, value in names.items() for part in ("--" + name.replace("_", "-"), str(value))]
    command = ["-m", "gptfast", "train", "--data", str(text), *options, "--batch-size", "6", "--grad-accum", "2"]
    command += ["--max-steps", "12", "--eval-every", "6", "--log-every", "1", "--whole-words"]
    logs = {}
    for n in (1, 2, 3):
        out = tmp_path / str(n)
        found = [finish(process) for process in ranks(n, *command, "--out", str(out))]
        assert [code for code, _ in found] == [0] * n, found
        logs[n] = [{k: r[k] for k in r if "loss" in k} for r in map(json.loads, (out / "log.jsonl").open())]
        assert sum("mlm_loss" in record for record in logs[n]) == 12
    for n in (2, 3):
        for one, many in zip(logs[1], logs[n], strict=True):
            assert many == pytest.approx(one, abs=1e-6)
    refused = [finish(process) for process in ranks(2, *command, "--out", str(tmp_path / "no"), "--parallel", "fsdp")]
    said = "".join(printed for _, printed in refused)
    assert [code for code, _ in refused] == [1, 1] and said.count("error:") == 1
    assert "--objective mlm needs the whole model in each process, but --parallel fsdp leaves it a part" in said


def test_a_mixture_resumes_to_the_same_bits_and_names_its_sources(text: Path, tmp_path: Path):
    for name, file in (("one", "0.txt"), ("two", "1.txt")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text((text / file).read_text())
        (tmp_path / name / "more.txt").write_text((text / "2.txt").read_text())
    tables = [f'[[source]]\nname = "{name}"\ndata = "{name}"\nweight = {w}\n' for name, w in (("one", 3), ("two", 1))]
    mixture = tmp_path / "mixture.toml"
    mixture.write_text("".join(tables))
    ready, _ = run(mixture, tmp_path / "whole", 8)
    run(mixture, tmp_path / "part", 3)
    resumed_run({"out": tmp_path / "part", "max_steps": 8}).trainer.train()
    assert same(tmp_path / "whole", tmp_path / "part")
    sampler = ready.trainer.objective.sampler
    batch, alone = sampler.batch_from(5, 6), [sampler.batch_from(n, 1) for n in range(5, 11)]
    for name, rows in batch.items():
        assert torch.equal(rows, torch.cat([one[name] for one in alone])), "a row depends on its number alone"
    sources, numbers = sampler._places(np.arange(4096))
    assert np.bincount(sources).tolist() == [3072, 1024]
    n = int(np.flatnonzero(sources == 1)[0])
    own = sampler._samplers[1].batch_from(int(numbers[n]), 1)
    assert all(torch.equal(sampler.batch_from(n, 1)[name], rows) for name, rows in own.items())
    with pytest.raises(ValueError, match="source one: WindowSampler: the data has"):
        run(mixture, tmp_path / "long", 1, block_size=1 << 14)


@pytest.mark.slow  # a compilation
def test_a_compiled_network_trains_to_the_same_losses_in_one_graph(text: Path, tmp_path: Path):
    from torch._dynamo.utils import counters

    run(text, tmp_path / "plain", 3, eval_every=1)
    torch._dynamo.reset()
    counters.clear()
    run(text, tmp_path / "compiled", 3, eval_every=1, compile=True)
    plain, compiled = (
        [
            r["val_loss"]
            for r in map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
            if "val_loss" in r
        ]
        for name in ("plain", "compiled")
    )
    assert len(plain) == 3 and compiled == pytest.approx(plain, abs=1e-5)  # dropout 0.1: the same masks
    assert counters["stats"]["unique_graphs"] == 1


def test_without_next_sentences_and_from_a_checkpoint(text: Path, tmp_path: Path):
    _, result = run(text, tmp_path / "one", 4, no_next_sentence=True, whole_words=True)
    records = [json.loads(line) for line in (tmp_path / "one/log.jsonl").read_text().splitlines()]
    assert not any("nsp_loss" in record for record in records)
    options = {name: x for name, x in OPTIONS.items() if name not in SHAPE and name != "vocab_size"}
    start = {
        **options,
        "data": str(text),
        "init_from": str(tmp_path / "one/best"),
        "out": tmp_path / "two",
        "max_steps": 2,
    }
    trainer = new_run(start).trainer
    assert trainer.model.config.n_embd == 32 and isinstance(trainer.objective, MaskedLanguageModelling)
    assert trainer.train().best_val_loss < result.best_val_loss + 1.0


def test_a_step_that_goes_back_and_an_average(text: Path, tmp_path: Path):
    """`restore` and `write` are those of the objective."""
    ready, _ = run(text, tmp_path / "one", 6, ema=0.5, checkpoint_every=3)
    assert isinstance(BERT.from_pretrained(tmp_path / "one/best-ema"), BERT)
    objective = ready.trainer.objective
    with torch.no_grad():
        objective.network.wte.weight.zero_()
    objective.restore(tmp_path / "one/last")
    stored = load_file(tmp_path / "one/last/model.safetensors")["bert.embeddings.word_embeddings.weight"]
    assert torch.equal(objective.network.wte.weight, stored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--mlm-probability", "0.3"],
            "--mlm-probability is 0.3, but --objective is 'lm', a causal model without masks",
        ),
        (["--whole-words"], "--whole-words is True, but --objective is 'lm'"),
        (["--objective", "mlm", "--preset", "gpt2"], "every position of --preset gpt2 sees no later tokens"),
        (["--preset", "bert-base"], "every position of --preset bert-base sees the token that it is to predict"),
        (
            ["--objective", "mlm", "--tokenizer", "char"],
            "needs a tokenizer with [MASK], [CLS] and [SEP], and 'char' has none",
        ),
        (["--objective", "mlm", "--pack-documents"], "--pack-documents is for --objective 'lm'"),
        (["--objective", "mlm", "--sequence-warmup", "3"], "--sequence-warmup is for --objective 'lm'"),
        (["--objective", "mlm", "--mlm-probability", "1"], "--mlm-probability is 1.0; expected a number in (0, 1)"),
        (["--objective", "mlm", "--vocab-size", "60", "--find-batch-size"], "--find-batch-size is for --objective lm"),
        (["--objective", "rtd"], "--objective"),
    ],
)
def test_refusals_in_one_line(text: Path, tmp_path: Path, options: list[str], message: str, capsys):
    small = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--max-steps", "1"]
    assert gptfast("train", "--data", text, "--out", tmp_path / "run", *small, *options) != 0
    said = capsys.readouterr().err
    assert message in " ".join(said.split()) and "Traceback" not in said


def test_models_that_do_not_go_with_the_objective(text: Path, tmp_path: Path):
    ready, _ = run(text, tmp_path / "one", 1)
    tokens, tokenizer = ready.data.train, load_tokenizer(tmp_path / "one/last")
    shape = {**SHAPE, "vocab_size": 60}
    gpt, bert = GPT(GPTConfig(**shape)), BERT(GPTConfig.preset("bert-base", **shape))
    with pytest.raises(ValueError, match="objective is mlm, but the model is causal"):
        Trainer(gpt, tokens, tokens, TrainConfig(objective="mlm"), tmp_path / "a", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="objective is lm, but every position"):
        Trainer(bert, tokens, tokens, TrainConfig(), tmp_path / "b", tokenizer=tokenizer)
    headless = BERT(bert.config.replace(head_transform=False))
    with pytest.raises(ValueError, match="without a head for masks"):
        Trainer(headless, tokens, tokens, TrainConfig(objective="mlm"), tmp_path / "c", tokenizer=tokenizer)
    with pytest.raises(ValueError, match="none was given"):
        Trainer(bert, tokens, tokens, TrainConfig(objective="mlm"), tmp_path / "d")


def test_resuming_with_another_objective_is_refused(text: Path, tmp_path: Path):
    run(text, tmp_path / "one", 2)
    with pytest.raises(ValueError, match=r"`mlm_probability` is 0\.3"):
        resumed_run({"out": tmp_path / "one", "max_steps": 4, "mlm_probability": 0.3})
    with pytest.raises(ValueError, match="`objective` is lm"):
        resumed_run({"out": tmp_path / "one", "max_steps": 4, "objective": "lm"})
