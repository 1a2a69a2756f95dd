"""Soft prompts in the engine: rows that begin with vectors, beside rows under low-rank adapters and under none."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

import gptfast
from gptfast import GPT
from gptfast.backend import has_cpu_ops
from gptfast.engine import EngineRunner
from gptfast.finetuning import LoraConfig, PromptTuningConfig, TaskModel
from gptfast.generation import TorchRunner, generate, score
from tests.support.engine_models import ids_of, model_of, relative_error

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

NAMES = ["long", "__base__", "short", "lora", "long", "short"]


def prompted(kind: str = "gpt2") -> GPT:
    gpt = copy.deepcopy(model_of(kind))
    torch.manual_seed(3)
    gpt.add_adapter(LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "lora")
    for name, n in (("long", 19), ("short", 3)):
        gpt.add_adapter(PromptTuningConfig(n, prompt_tuning_init="RANDOM"), name)
    return gpt.eval()


def ids(kind: str, T: int = 40) -> Tensor:
    return ids_of(kind)[:, :T].repeat(3, 1)


def in_float64(gpt: GPT, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad(), gptfast.backend("eager"):
        return copy.deepcopy(gpt).double()(ids, **options)


@pytest.mark.parametrize("kind", ["gpt2", "gpt1", "gpt3", "odd"])
def test_a_mixed_batch_is_that_of_torch(kind: str, isa: str) -> None:
    gpt, given = prompted(kind), ids(kind)
    compiled = gpt.compile_for_inference("float32")
    logits = compiled.logits(given, NAMES)
    assert relative_error(logits, in_float64(gpt, given, adapter_names=NAMES)) < 2e-6
    bare = model_of(kind).compile_for_inference("float32").logits(given)
    assert torch.equal(logits[1], bare[1]) and relative_error(logits[0], bare[0].double()) > 0.01
    gpt.set_adapter(["lora", "short"])  # the prompt's own positions are under the adapter too
    both = gpt.compile_for_inference("float32").logits(given)
    assert relative_error(both, in_float64(gpt, given)) < 2e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "q4"])
def test_bits_do_not_depend_on_other_rows(dtype: str, isa: str) -> None:
    gpt, row_ids = prompted("odd"), ids("odd", 45)[0].tolist()
    wanted = gpt.compile_for_inference(dtype, threads=1).logits([row_ids], ["long"])[0]
    runner = gpt.compile_for_inference(dtype, threads=2).runner(4)
    others = [runner.allocate(1, name)[0] for name in ("short", "__base__", "lora")]
    (row,) = runner.allocate(1, "long")
    parts, at = [], 0
    for n in (1, 7, 37):
        new = [[5], [6, 7], row_ids[at : at + n], [1]]
        parts.append(runner.extend([others[0], others[1], row, others[2]], new, False)[2])
        at += n
    assert torch.equal(torch.cat(parts), wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"seed": 1, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}],
)
def test_generation_is_that_of_torch(options: dict[str, Any]) -> None:
    gpt = prompted()
    assert isinstance(gpt.runner(1, 9), EngineRunner)
    prompts = [row[: 5 + n].tolist() for n, row in enumerate(ids("gpt2"))]
    own = {"max_new_tokens": 9, "adapter_names": NAMES, **options}
    texts = generate(gpt, prompts, **own)
    assert texts == generate(TorchRunner(gpt, 18, 60), prompts, **own)
    assert texts == generate(gpt.compile_for_inference("float32"), prompts, **own)
    gpt.set_adapter("short")
    assert score(gpt, prompts[3]) == pytest.approx(score(TorchRunner(gpt, 1, 60), prompts[3]), abs=1e-5)


def test_a_prompt_takes_room_and_stays_when_a_text_slides() -> None:
    gpt = prompted("odd")  # block_size 70
    compiled = gpt.compile_for_inference("float32")
    row = ids("odd", 60)[0].tolist()
    with pytest.raises(ValueError, match="block_size is 70, of which a soft prompt takes 19"):
        generate(compiled, [row], max_new_tokens=5, adapter_names=["long"])
    for model in (gpt, compiled):
        text = generate(model, [row[:40]], max_new_tokens=30, overflow="slide", adapter_names=["long"])
        assert text == generate(
            TorchRunner(gpt, 1, 70), [row[:40]], max_new_tokens=30, overflow="slide", adapter_names=["long"]
        )
    runner = compiled.runner(2)
    (slot,) = runner.allocate(1, "long")
    wanted = runner.extend([slot], [row[:5]])
    assert runner.lengths == [5, 0] and runner.virtual_tokens("long") == 19
    runner.truncate(slot, 0)
    assert torch.equal(runner.extend([slot], [row[:5]]), wanted)
    with pytest.raises(ValueError, match="holds 5 positions and 47 more do not fit into max_len = 51"):
        runner.extend([slot], [row[:47]])
    runner.free(slot)
    (slot,) = runner.allocate(1, "__base__")
    assert torch.equal(runner.extend([slot], [row[:5]])[0], compiled.logits([row[:5]], ["__base__"])[0, -1])
    assert runner.extend([slot], [row[:60]]).shape == (1, 33), "the room of a prompt that is gone"


def test_a_prompt_that_has_changed_is_packed_again() -> None:
    gpt, given = prompted(), ids("gpt2")[:1].tolist()

    def logits() -> Tensor:
        runner = gpt.runner(1, 60)
        assert isinstance(runner, EngineRunner)
        return runner.extend(runner.allocate(), given)

    before = logits()
    gpt.prompt_encoder["short"].embedding.weight.data.mul_(1.5)
    after = logits()
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, gpt(torch.tensor(given), last_only=True).detach(), rtol=1e-4, atol=1e-4)
    gpt.delete_adapter("short")
    gpt.disable_adapters()
    assert not torch.equal(logits(), after)


def test_prompts_load_beside_a_packed_base(tmp_path) -> None:
    gpt, given = prompted(), ids("gpt2")
    for name in ("long", "short", "lora"):
        gpt.save_adapter(tmp_path / name, name)
    packed = model_of("gpt2").compile_for_inference("int8")
    for name in ("long", "short", "lora"):
        packed.load_adapter(tmp_path / name, name)
    assert torch.equal(packed.logits(given, NAMES), gpt.compile_for_inference("int8").logits(given, NAMES))
    with pytest.raises(ValueError, match="'long', 'short' are soft prompts, of which a row has one"):
        packed.set_adapter(["long", "short"])
    with pytest.raises(ValueError, match="the adapter was trained on another base: bf16:"):
        model_of("odd").compile_for_inference("int8").load_adapter(tmp_path / "long")


def test_the_compiled_part_checks_vectors() -> None:
    runner = model_of("gpt2").compile_for_inference("float32").runner(1)
    (slot,) = runner.allocate()
    for bad in (torch.ones(2, 127), torch.ones(150, 128), torch.ones(0, 128)):
        with pytest.raises(ValueError, match="prefix: expected"):
            runner._cache.prefix(slot, to_dlpack(bad))
    runner.extend([slot], [[1]])
    with pytest.raises(ValueError, match="prefix: expected an empty slot"):
        runner._cache.prefix(slot, to_dlpack(torch.ones(2, 128)))
    with pytest.raises(ValueError, match="slot 3 is not in use"):
        runner._cache.prefix(3, to_dlpack(torch.ones(2, 128)))


@pytest.mark.parametrize("config", [LoraConfig(target_modules=["c_attn"]), PromptTuningConfig(3)])
def test_the_head_of_a_task_is_refused(config: Any, tmp_path: Path) -> None:
    gpt = copy.deepcopy(model_of("gpt2"))
    packed = gpt.compile_for_inference("int8")
    model = TaskModel(gpt, "classification", labels=["no", "yes"], special_tokens={"pad": 0})
    gpt.add_adapter(config)
    model.save_adapter(tmp_path / "a")
    with pytest.raises(ValueError, match=r"holds base_model\.\S*score\.weight, the head of a task.*TaskModel"):
        packed.load_adapter(tmp_path / "a", any_base=True)
    assert packed.adapters == ()
