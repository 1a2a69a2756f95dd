"""GPTConfig, presets against the published sizes, and the parameter table."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from typer.testing import CliRunner

from gptfast.models import BERT, GPT, PRESETS, GPTConfig
from gptfast.models.parameter_table import parameter_table

MILLION, BILLION = 10**6, 10**9

PUBLISHED = {  # GPT-2's paper prints 117M, 345M, 762M and 1542M; these are the corrected counts of its repository
    "gpt1": 117 * MILLION,
    "gpt2": 124 * MILLION,
    "gpt2-medium": 355 * MILLION,
    "gpt2-large": 774 * MILLION,
    "gpt2-xl": 1558 * MILLION,
    "gpt3-125m": 125 * MILLION,
    "gpt3-350m": 350 * MILLION,
    "gpt3-760m": 760 * MILLION,
    "gpt3-1.3b": 1.3 * BILLION,
    "gpt3-2.7b": 2.7 * BILLION,
    "gpt3-6.7b": 6.7 * BILLION,
    "gpt3-13b": 13.0 * BILLION,
    "gpt3-175b": 175.0 * BILLION,
    "bert-base": 110 * MILLION,
    "bert-large": 340 * MILLION,
    "gpt-oss-20b": 20.9 * BILLION,
    "gpt-oss-120b": 116.8 * BILLION,
}
OWN = {"gptoss-tiny"}  # published nowhere
EXACT = {"gpt1": 116_534_784, "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}
EXACT |= {"bert-base": 110_106_428, "bert-large": 336_226_108}  # the paper rounds the second to 340M


def on_meta(config: GPTConfig) -> GPT | BERT:
    with torch.device("meta"):
        return GPT(config) if config.causal else BERT(config)


def test_every_preset_has_a_published_size():
    assert PUBLISHED.keys() == PRESETS.keys() - OWN


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_number_of_parameters(name: str):
    count = on_meta(GPTConfig.preset(name)).num_parameters()
    assert abs(count / PUBLISHED[name] - 1) < 0.018  # 350M is printed for 356M; the others are within 1.2%
    assert count == EXACT.get(name, count)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"tie_weights": False, "position_embedding": "sinusoidal"}])
def test_parameter_table_adds_up_to_the_model(name: str, options: dict):
    if GPTConfig.preset(name).position_embedding == "rotary":  # whose tables are no parameters
        options = {key: value for key, value in options.items() if key != "position_embedding"}
    config = GPTConfig.preset(name, **options)
    assert sum(row.count for row in parameter_table(config)) == on_meta(config).num_parameters()


def test_the_175b_model_matrix_by_matrix():
    rows = {row.category: row.count for row in parameter_table(GPTConfig.preset("gpt3-175b"))}
    assert rows["Embedding"] == rows["Unembedding"] == 12288 * 50257 == 617_558_016
    for name in ("Key", "Query", "Value", "Output"):
        assert rows[name] == 128 * 12288 * 96 * 96 == 14_495_514_624
    assert rows["Up-projection"] == rows["Down-projection"] == 49152 * 12288 * 96 == 57_982_058_496
    weights = ("Embedding", "Key", "Query", "Value", "Output", "Up-projection", "Down-projection", "Unembedding")
    assert sum(rows[name] for name in weights) == 175_181_291_520


def test_gpt1_and_gpt3_shapes():
    gpt1, gpt3 = GPTConfig.preset("gpt1"), GPTConfig.preset("gpt3-2.7b")
    assert (gpt1.norm_position, gpt1.final_norm, gpt1.block_size) == ("post", False, 512)
    assert [gpt3.window_of(layer) for layer in range(4)] == [None, gpt3.window, None, gpt3.window]
    assert (gpt3.head_dim, gpt3.block_size) == (80, 2048)


def test_dropout_sets_all_three():
    for config in (
        GPTConfig(dropout=0.25),
        GPTConfig.preset("gpt2", dropout=0.25),
        GPTConfig.preset("gpt2").with_dropout(0.25),
        GPTConfig().replace(dropout=0.25),
    ):
        assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.25, 0.25, 0.25)
    assert GPTConfig.preset("gpt2", resid_pdrop=0.5).resid_pdrop == 0.5


def test_presets_have_the_dropout_of_their_papers():
    """GPT-3 was trained without; a rate that is given counts."""
    for name in ("gpt3-125m", "gptoss-tiny"):
        config = GPTConfig.preset(name, resid_pdrop=0.5)
        assert (config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) == (0.0, 0.0, 0.5)
        assert GPTConfig.preset(name, dropout=0.2).attn_pdrop == 0.2
    assert GPTConfig.preset("gpt2").attn_pdrop == 0.1


def test_config_is_frozen_and_without_arguments_gpt2():
    assert GPTConfig() == GPTConfig.preset("gpt2")
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"n_embd": 100}, ValueError, "n_embd is 100 but n_head is 12.*try n_embd=96 or 108"),
        ({"n_head": 2}, ValueError, "head_dim of 384.*use n_head >= 3"),
        ({"n_layer": 0}, ValueError, "n_layer is 0; expected at least 1"),
        ({"n_layer": 2.0}, TypeError, "n_layer is 2.0; expected an int"),
        ({"block_size": True}, TypeError, "block_size is True; expected an int"),
        ({"dropout": 1.5}, ValueError, r"embd_pdrop is 1.5; expected a probability in \[0, 1\]"),
        ({"attn_pdrop": float("nan")}, ValueError, "attn_pdrop is nan"),
        ({"resid_pdrop": "0.1"}, TypeError, "resid_pdrop is '0.1'; expected a probability"),
        ({"layer_norm_epsilon": 0.0}, ValueError, "layer_norm_epsilon is 0.0; expected a number > 0"),
        ({"norm_position": "middle"}, ValueError, "norm_position is 'middle'; expected one of pre, post"),
        (
            {"activation": "mish"},
            ValueError,
            "activation is 'mish'; expected one of gelu_tanh, gelu, relu, silu",
        ),
        ({"attention_pattern": "alternating"}, ValueError, "window=None; 'alternating' needs a window"),
        ({"window": 16}, ValueError, "'dense' takes none"),
        ({"window": 0, "attention_pattern": "alternating"}, ValueError, "window is 0; expected at least 1"),
        ({"bias": 1}, TypeError, "bias is 1; expected True or False"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_wrong_values_are_named(wrong: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=f"GPTConfig: .*{message}"):
        GPTConfig(**wrong)


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown preset 'gpt4'; expected one of gpt1, gpt2"):
        GPTConfig.preset("gpt4")
    with pytest.raises(TypeError, match="GPTConfig has no field 'n_layers'; it has n_layer"):
        GPTConfig.preset("gpt2", n_layers=3)


def test_info_prints_the_parameter_table(monkeypatch):
    from gptfast.cli import app

    monkeypatch.setenv("COLUMNS", "120")
    printed = CliRunner().invoke(app, ["info", "gpt3-175b"])
    assert printed.exit_code == 0
    assert len(re.findall("617,558,016", printed.output)) == 2
    assert "175,221,817,344" in printed.output
    assert "700.9 GB in fp32, 350.4 GB in bf16" in printed.output
    assert "is the embedding" in CliRunner().invoke(app, ["info", "gpt2"]).output


def test_info_lists_the_presets(monkeypatch):
    from gptfast.cli import app

    monkeypatch.setenv("COLUMNS", "120")
    printed = CliRunner().invoke(app, ["info"])
    assert printed.exit_code == 0
    lines = [line for line in printed.output.splitlines() if line.startswith(("│ gpt", "│ bert"))]
    assert [line.split()[1] for line in lines] == list(PRESETS)
    assert lines[1].split("│")[-2].strip() == "124.4M"
