"""rotary_tables: transformers' numbers to the bit, for every rope_type that both have; errors."""

from __future__ import annotations

import math

import pytest
import torch

from gptfast import ops

LENGTH = "original_max_position_embeddings"
YARN = {"rope_type": "yarn", "factor": 32.0, LENGTH: 4096, "beta_fast": 32.0, "beta_slow": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, LENGTH: 8192, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "none": None,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, LENGTH: 2048},
    "yarn whole numbers": {"rope_type": "yarn", "factor": 4, LENGTH: 32768, "attention_factor": None},
    "gpt-oss": YARN | {"truncate": False},
    "yarn truncated": YARN,
    "yarn stated factor": YARN | {"attention_factor": 1.25},
    "yarn mscale": YARN | {"mscale": 0.707, "mscale_all_dim": 0.5},
    "yarn other betas": YARN | {"beta_fast": 16, "beta_slow": 2},
    "yarn below 1": YARN | {"factor": 0.5},
    "yarn short": YARN | {LENGTH: 4, "truncate": False},
    "llama3": LLAMA3,
    "llama 3.2": LLAMA3 | {"factor": 32.0},
}


@pytest.mark.parametrize("theta", [10000.0, 150000.0, 500000])
@pytest.mark.parametrize("name", SCALINGS)
def test_transformers_numbers(name, theta):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    transformers = pytest.importorskip("transformers")
    for dim in (64, 20):
        config = transformers.GptOssConfig(head_dim=dim, max_position_embeddings=131072)
        config.rope_parameters = {"rope_theta": theta, **(SCALINGS[name] or {"rope_type": "default"})}
        places = torch.cat([torch.arange(40), torch.tensor([4095, 4096, 131071])])
        cos, sin = gpt_oss.GptOssRotaryEmbedding(config)(torch.ones(1), places[None])
        ours = ops.rotary_tables(131072, dim, theta, SCALINGS[name])
        assert torch.equal(ours[0][places], cos[0]) and torch.equal(ours[1][places], sin[0])


def test_llama_and_neox():
    """The modules that double their tables, and rotate a part of the channels."""
    transformers = pytest.importorskip("transformers")
    models = transformers.models
    places = torch.arange(100)[None]
    llama = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters=LLAMA3 | {"rope_theta": 5e5}
    )
    theirs = models.llama.modeling_llama.LlamaRotaryEmbedding(llama)(torch.ones(1), places)
    for one, two in zip(theirs, ops.rotary_tables(100, 16, 5e5, LLAMA3), strict=True):
        assert torch.equal(one[0], torch.cat([two, two], -1))
    neox = transformers.GPTNeoXConfig(hidden_size=64, num_attention_heads=2)
    theirs = models.gpt_neox.modeling_gpt_neox.GPTNeoXRotaryEmbedding(neox)(torch.ones(1), places)
    for one, two in zip(theirs, ops.rotary_tables(100, 8, 10000), strict=True):
        assert torch.equal(one[0], torch.cat([two, two], -1))


def test_sizes_and_exactness():
    cos, sin = ops.rotary_tables(7, 10, 1000.0)
    assert cos.shape == sin.shape == (7, 5) and cos.dtype == sin.dtype == torch.float32
    angles = torch.arange(7).double()[:, None] * 1000.0 ** (-torch.arange(5).double() / 5)
    torch.testing.assert_close(cos, angles.cos().float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin, angles.sin().float(), rtol=0, atol=1e-6)
    assert ops.rotary_tables(0, 4)[0].shape == (0, 2)
    assert ops.rotary_tables(3, 4, device="meta")[1].is_meta
    whole = {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, **LLAMA3}
    assert torch.equal(ops.rotary_tables(9, 8, scaling=whole)[0], ops.rotary_tables(9, 8, scaling=LLAMA3)[0])
    assert torch.equal(
        ops.rotary_tables(9, 8, scaling={"type": "linear", "factor": 2})[0][::2], ops.rotary_tables(5, 8)[0]
    )


def test_yarns_frequencies_by_hand():
    """Fast ones stay, slow ones are divided; both with the tables' factor 0.1 ln 32 + 1."""
    cos, _ = ops.rotary_tables(4097, 64, 150000.0, YARN | {"truncate": False})
    factor = 0.1 * math.log(32) + 1
    torch.testing.assert_close(cos[1, 0], torch.tensor(1.0).cos() * factor)
    slow = 150000.0 ** (-62 / 64) / 32
    torch.testing.assert_close(cos[4096, 31], torch.tensor(4096 * slow).cos() * factor)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-1, 8), ValueError, "rotary_tables: n is -1; expected at least 0"),
        ((4, 7), ValueError, "rotary_tables: dim is 7; expected an even number"),
        ((4, 0), ValueError, "rotary_tables: dim is 0; expected at least 1"),
        ((4, 8.0), TypeError, "rotary_tables: dim is 8.0; expected an int"),
        ((4, 8, 1), ValueError, "rotary_tables: theta is 1; expected a finite number > 0 other than 1"),
        ((4, 8, "x"), TypeError, "rotary_tables: theta is 'x'"),
        ((4, 8, 1e4, 2.0), TypeError, "rotary_tables: scaling is 2.0; expected None or a dictionary"),
        (
            (4, 8, 1e4, {"rope_type": "dynamic"}),
            ValueError,
            "rope_type of scaling is 'dynamic'; expected one of 'default'",
        ),
        ((4, 8, 1e4, {"rope_type": "linear"}), ValueError, "rotary_tables: scaling has no factor, which linear needs"),
        (
            (4, 8, 1e4, YARN | {"high_freq_factor": 1.0}),
            ValueError,
            "scaling has 'high_freq_factor'; yarn takes factor, orig",
        ),
        ((4, 8, 1e4, YARN | {"factor": 0}), ValueError, "factor of scaling is 0; expected a finite number > 0"),
        ((4, 8, 1e4, YARN | {"truncate": 1}), TypeError, "truncate of scaling is 1; expected True or False"),
        (
            (4, 8, 1e4, LLAMA3 | {"high_freq_factor": 1.0}),
            ValueError,
            "low_freq_factor of scaling is 1.0 and high_freq_factor 1",
        ),
    ],
)
def test_errors(arguments, error, match):
    with pytest.raises(error, match=match):
        ops.rotary_tables(*arguments)
