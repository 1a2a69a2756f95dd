"""What a run would need on many ranks, against what it has on two."""

from __future__ import annotations

import torch

from gptfast.config import GPTConfig
from gptfast.training.simulate import main, needs

SHAPE = GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=100)


def test_parts_of_all_ranks_are_the_model_and_more_ranks_need_less():
    two, eight = (needs(SHAPE, n) for n in (2, 8))
    assert two.weights == 4 * two.parameters / 2  # every number of rows here is even
    assert two.optimizer == 2 * two.gradients == 2 * two.weights
    assert eight.weights < two.weights / 3.5
    assert eight.traffic > two.traffic
    assert eight.activations == two.activations


def test_options_move_memory_and_traffic_as_they_say():
    forward, once, each = (needs(SHAPE, 4, passes=4, reshard=name) for name in ("forward", "step", "pass"))
    assert once.parameter_traffic < forward.parameter_traffic == each.parameter_traffic
    assert forward.gradient_traffic == once.gradient_traffic == each.gradient_traffic / 4
    assert each.gathered < forward.gathered < once.gathered
    plain, again = (needs(SHAPE.replace(n_layer=12), 4, recompute=value) for value in (False, True))
    assert again.activations < plain.activations / 2
    assert again.flops > plain.flops
    halves = needs(SHAPE, 4, dtype=torch.float32)
    assert halves.parameter_traffic > needs(SHAPE, 4).parameter_traffic


def test_the_command_divides_the_largest_gpt3_among_1024_ranks(capsys):
    main(["--ranks", "1024", "--recompute"])
    said = capsys.readouterr().out
    assert "gpt3-175b: 175." in said
    assert "on 1024 ranks" in said
