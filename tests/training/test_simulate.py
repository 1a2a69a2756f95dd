"""What a run would need on many ranks, against what it has on two."""

from __future__ import annotations

import pytest
import torch

from gptfast.config import GPTConfig
from gptfast.models import GPT
from gptfast.training.ranks import Ranks
from gptfast.training.sharding import parts_of
from gptfast.training.simulate import _fake_ranks, main, needs, sums_of_a_block
from gptfast.training.tensor_parallel import divide

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


def test_tensor_parallelism_divides_layers_and_what_they_keep():
    wide = SHAPE.replace(n_layer=4)
    plain, layers = needs(wide, 4), needs(wide, 4, tensor=2)
    assert layers.weights == plain.weights + layers_rest(wide)
    assert plain.activations / 2 < layers.activations < plain.activations
    assert plain.flops / 2 < layers.flops < plain.flops
    assert plain.tensor_traffic == 0 < layers.tensor_traffic
    assert layers.gathered < plain.gathered


def layers_rest(config: GPTConfig) -> int:
    """Bytes that a rank of four has more where two have the same: half of two quarters of what layers are not divided of."""
    model = GPT(config)
    same = [p for name, p in model.named_parameters() if not name.startswith("h.") or "ln_" in name]
    same += [p for name, p in model.named_parameters() if name.endswith("c_proj.bias")]
    return sum(p.numel() for p in same)


@pytest.mark.parametrize("recompute", [False, True])
def test_sums_of_tensor_parallelism_are_as_many_as_are_counted(recompute, monkeypatch):
    summed: list[int] = []
    monkeypatch.setattr(Ranks, "total", lambda self, flat, *others: summed.append(flat.numel()) or flat)
    counts = []
    for layers in (1, 2):
        with _fake_ranks(2, 2) as ranks:
            model = GPT(SHAPE.replace(n_layer=layers)).train()
            model.recompute = recompute
            for part in parts_of(model):
                divide(part, ranks)
            ids = torch.zeros((3, 8), dtype=torch.int64)
            model(ids, ids)[1].backward()
        counts.append(len(summed))
    assert set(summed) == {3 * 8 * SHAPE.n_embd}
    assert counts[1] - 2 * counts[0] == sums_of_a_block(recompute)


def test_the_command_divides_the_largest_gpt3_among_1024_ranks(capsys):
    main(["--ranks", "1024", "--recompute", "--tensor-parallel", "8"])
    said = capsys.readouterr().out
    assert "gpt3-175b: 175." in said
    assert "on 1024 ranks, 8 to a layer" in said
    assert "sums of tensor parallelism" in said
    with pytest.raises(SystemExit):
        main(["--ranks", "1024", "--tensor-parallel", "7"])
    assert "--tensor-parallel is 7 but there are 1024 processes" in capsys.readouterr().err
