"""gptfast train --config, --print-config and --recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomlkit

from gptfast.config import PRESETS
from gptfast.training import TrainConfig
from gptfast.training.recipes import RECIPES, recipe_options
from gptfast.training.run_file import merged_options, read_options, whole_options
from tests.support.train_command import gptfast


def whole(**given) -> dict:
    return tomlkit.parse(whole_options(merged_options(given))).unwrap()


def test_the_printed_configuration_gives_itself(tmp_path: Path):
    file = tmp_path / "run.toml"
    for given in ({}, {"preset": "gpt3-125m", "threads": 2}, {"recipe": "gpt1", "max_minutes": 3.0, "glob": ["*.md"]}):
        file.write_text(whole_options(merged_options(given)))
        assert whole_options(merged_options({"config": file})) == file.read_text()


def test_the_command_line_goes_before_the_file_and_the_file_before_the_recipe(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('recipe = "gpt3-350m"\nlearning_rate = 1e-4\nbeta2 = 0.9\nbatch_size = 4\n')
    found = whole(config=file, learning_rate=5e-4)
    assert (found["learning_rate"], found["beta2"], found["beta1"]) == (5e-4, 0.9, 0.9)
    assert (found["n_layer"], found["n_embd"], found["block_size"]) == (24, 1024, 2048)
    assert found["batch_size"] * found["grad_accum"] * found["block_size"] == 2**19


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("lerning_rate = 1.0", ValueError, "run.toml: unknown key lerning_rate; did you mean learning_rate"),
        ("n-layer = 1", ValueError, "unknown key n-layer; did you mean n_layer"),
        ("[train]\nlr = 1", ValueError, "unknown key train"),
        ("resume = true", ValueError, "resume is of one start of a run"),
        ("learning_rate = '1e-3'", TypeError, "learning_rate is '1e-3'; expected float"),
        ("batch_size = 4.0", TypeError, "batch_size is 4.0; expected int"),
        ("batch_size = true", TypeError, "batch_size is True; expected int"),
        ("out = 1", TypeError, "out is 1; expected text"),
        ("glob = '*.md'", TypeError, "glob is '[*].md'; expected list of texts"),
        ("batch_size = ", ValueError, "run.toml is not TOML"),
    ],
)
def test_a_file_names_what_is_wrong_in_it(tmp_path: Path, text: str, error: type[Exception], message: str):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(error, match=message):
        read_options(file)


def test_recipes_are_the_published_ones():
    """Radford et al. 2018, section 4.1; Brown et al., arXiv 2005.14165, table 2.1: tokens of a step and learning rate."""
    table = {"125m": (0.5, 6), "350m": (0.5, 3), "760m": (0.5, 2.5), "1.3b": (1, 2), "2.7b": (1, 1.6), "6.7b": (2, 1.2)}
    for size, (millions, rate) in {**table, "13b": (2, 1), "175b": (3.2, 0.6)}.items():
        found = whole(recipe=f"gpt3-{size}")
        tokens = found["batch_size"] * found["grad_accum"] * found["block_size"]
        assert tokens == pytest.approx(millions * 1e6, rel=0.05) and found["learning_rate"] == pytest.approx(
            rate * 1e-4
        )
        assert found["warmup_steps"] * tokens == pytest.approx(375e6, rel=0.01)
        assert found["min_lr"] == pytest.approx(rate * 1e-5)
        assert (found["beta1"], found["beta2"], found["grad_clip"]) == (0.9, 0.95, 1.0)
    gpt1 = whole(recipe="gpt1")
    assert gpt1["batch_size"] * gpt1["grad_accum"] * gpt1["block_size"] == 64 * 512
    assert (gpt1["learning_rate"], gpt1["warmup_steps"], gpt1["dropout"]) == (2.5e-4, 2000, 0.1)
    assert set(RECIPES) == {
        name for name in PRESETS if name.startswith("gpt") and "oss" not in name
    }  # gpt-oss' are unpublished
    assert "never published" in whole_options(merged_options({"recipe": "gpt2"}))
    assert "contradicts itself" in whole_options(merged_options({"recipe": "gpt3-13b"}))


def test_a_recipe_keeps_its_tokens_a_step_whatever_the_shape():
    for given in ({"batch_size": 64}, {"block_size": 128, "batch_size": 2}, {"preset": "gpt2", "block_size": 512}):
        found = recipe_options("gpt3-125m", given)
        assert found["batch_size"] * found["grad_accum"] * given.get("block_size", 2048) == 2**19
        assert found["preset"] == given.get("preset", "gpt3-125m")
    with pytest.raises(ValueError, match=r"`recipe` is 'gpt3-125'.*did you mean gpt3-125m"):
        recipe_options("gpt3-125", {})


def test_the_batch_grows_over_the_tokens_of_its_warm_up():
    config = TrainConfig(batch_size=2, grad_accum=8, batch_warmup_tokens=1000, batch_warmup_from=20)
    passes = [config.passes(tokens, 10) for tokens in range(0, 1200, 100)]
    assert passes[0] == 1 and passes[5] in (4, 5) and passes[10:] == [8, 8]
    assert passes == sorted(passes) and set(passes) == set(range(1, 9))
    assert TrainConfig(grad_accum=3).passes(0, 10) == 3


def test_the_command_prints_and_starts_nothing_or_keeps_its_configuration(text, tmp_path, capsys):
    shape = ["--n-layer", "1", "--n-head", "2", "--n-embd", "8", "--block-size", "16", "--batch-size", "2"]
    out = tmp_path / "run"
    options = ["--data", text, "--tokenizer", "char", *shape, "--max-steps", "2", "--dtype", "float32", "--out", out]
    capsys.readouterr()
    assert gptfast("train", *options, "--print-config") == 0
    printed = capsys.readouterr().out
    assert not out.exists() and tomlkit.parse(printed)["max_steps"] == 2
    file = tmp_path / "run.toml"
    file.write_text(printed)
    assert gptfast("train", "--config", file, "--seed", "3") == 0
    assert tomlkit.parse((out / "config.toml").read_text()).unwrap() == {**tomlkit.parse(printed).unwrap(), "seed": 3}
