"""Adapters in the engine: mixed batches, what they compute beside each format of the base, and no stale copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast import _C, GPT
from gptfast.backend import has_cpu_ops
from gptfast.engine import FORMATS, CompiledGPT, EngineRunner, engine_for
from gptfast.finetuning import LoraConfig
from gptfast.generation import Scheduler, TorchRunner, generate, score, stream
from tests.support.engine_models import CONFIGS, ids_of, model_of, relative_error

pytestmark = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")

NAMES = ["wide", "__base__", "deep", "deep", "wide", "__base__"]
KINDS = [kind for kind in CONFIGS if kind != "one"]


def adapted(kind: str = "gpt2") -> GPT:
    """A model with adapters that change its answers: of every matrix, and of some, with ranks that fit no tile."""
    gpt = copy.deepcopy(model_of(kind))
    torch.manual_seed(3)
    gpt.add_adapter(LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", init_lora_weights=False), "wide")
    gpt.add_adapter(LoraConfig(r=11, target_modules=["c_attn", "lm_head"], init_lora_weights=False), "deep")
    with torch.no_grad():
        for name, parameter in gpt.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return gpt.eval()


def ids(kind: str, T: int = 40) -> Tensor:
    return ids_of(kind)[:, :T].repeat(3, 1)


def in_float64(gpt: GPT, ids: Tensor, names: list[str]) -> Tensor:
    with torch.no_grad(), gptfast.backend("eager"):
        return copy.deepcopy(gpt).double()(ids, adapter_names=names)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_is_that_of_torch(kind: str, isa: str) -> None:
    gpt, given = adapted(kind), ids(kind)
    compiled = gpt.compile_for_inference("float32")
    logits = compiled.logits(given, NAMES)
    expected = in_float64(gpt, given, NAMES)
    assert relative_error(expected, in_float64(gpt, given, ["__base__"] * 6)) > 0.1, "the adapters matter"
    assert relative_error(logits, expected) < 2e-6
    bare = model_of(kind).compile_for_inference("float32").logits(given)
    for row, name in enumerate(NAMES):
        assert name != "__base__" or torch.equal(logits[row], bare[row])
        gpt.disable_adapters() if name == "__base__" else gpt.set_adapter(name)
        assert torch.equal(gpt.compile_for_inference("float32").logits(given[row]), logits[row]), "the active adapter"


@pytest.mark.parametrize("dtype", FORMATS)
def test_updates_beside_each_format(dtype: str, isa: str) -> None:
    """The error is the format's: of the base's part of an output that has grown by the update."""
    gpt, given = adapted(), ids("gpt2")
    compiled, bare = gpt.compile_for_inference(dtype), model_of("gpt2").compile_for_inference(dtype)
    logits = compiled.logits(given, NAMES)
    error = relative_error(logits, in_float64(gpt, given, NAMES))
    its_own = relative_error(bare.logits(given), in_float64(gpt, given, ["__base__"] * 6))
    assert error < 1.2 * its_own  # measured: 0.5 to 1.0
    assert torch.equal(logits[1], bare.logits(given[1]))
    assert bare.nbytes < compiled.nbytes < bare.nbytes + 2**18, "one base, and the factors"


@pytest.mark.parametrize("dtype", FORMATS)
def test_a_row_of_a_mixed_batch_has_the_bits_of_the_row_alone(dtype: str, isa: str) -> None:
    """Whatever is beside it, in which stretches it is read, and on how many threads."""
    gpt, row_ids = adapted("odd"), ids("odd", 60)[0].tolist()
    alone = gpt.compile_for_inference(dtype, threads=1)
    for name in ("deep", "wide"):
        wanted = alone.logits([row_ids], [name])[0]
        for threads in (2, 3):
            runner = gpt.compile_for_inference(dtype, threads=threads).runner(4)
            others = [runner.allocate(1, other)[0] for other in ("wide", "__base__", "deep")]
            (row,) = runner.allocate(1, name)
            parts, at = [], 0
            for n in (1, 1, 5, 7, 16, 30):
                new = [[5], [6, 7], row_ids[at : at + n], [1]]
                parts.append(runner.extend([others[0], others[1], row, others[2]], new, False)[2])
                at += n
            assert torch.equal(torch.cat(parts), wanted)


def texts(gpt: Any, **options: Any) -> list[list[int]]:
    prompts = [row[: 5 + n].tolist() for n, row in enumerate(ids("gpt2"))]
    return generate(gpt, prompts, max_new_tokens=7, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"seed": 1, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"seed": 2, "min_p": 0.1},
    ],
)
def test_generation_is_that_of_each_adapter_by_itself(options: dict[str, Any]) -> None:
    gpt = adapted()
    for model in (gpt, gpt.compile_for_inference("int8"), TorchRunner(gpt, 12, 150)):
        mixed = texts(model, adapter_names=NAMES, **options)
        copies = len(mixed) // len(NAMES)
        for name in set(NAMES):
            of_one = texts(model, adapter_names=[name] * len(NAMES), **options)
            assert len({str(text) for text in (mixed, of_one)}) == 2
            for n, own in enumerate(NAMES):
                if own == name:
                    assert mixed[n * copies : (n + 1) * copies] == of_one[n * copies : (n + 1) * copies]


def test_the_active_adapters_are_added_up() -> None:
    gpt, given = adapted(), ids("gpt2")
    gpt.set_adapter(["wide", "deep"])
    with torch.no_grad(), gptfast.backend("eager"):
        expected = copy.deepcopy(gpt).double()(given)
    compiled = gpt.compile_for_inference("float32")
    assert compiled.active_adapters == ["wide", "deep"] and relative_error(compiled.logits(given), expected) < 2e-6
    compiled.set_adapter("deep")
    assert torch.equal(compiled.logits(given), compiled.logits(given, ["deep"] * 6))
    compiled.disable_adapters()
    assert torch.equal(compiled.logits(given), compiled.logits(given, ["__base__"] * 6))
    compiled.enable_adapters()
    assert compiled.active_adapters == ["deep"]


def test_scores_and_streams_have_adapters() -> None:
    gpt, row = adapted(), ids("gpt2")[0].tolist()
    compiled = gpt.compile_for_inference("float32")
    for name in ("wide", "__base__"):
        expected = compiled.logits([row], [name])[0, :-1].log_softmax(-1).gather(1, torch.tensor(row)[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score(compiled, row, adapter=name)), expected)
    prompts = [row[:5]] * 2
    steps = [step.tokens for step in stream(gpt, prompts, max_new_tokens=5, adapter_names=["wide", "deep"])]
    whole = generate(gpt, prompts, max_new_tokens=5, adapter_names=["wide", "deep"])
    assert [list(new) for new in zip(*steps, strict=True)] == [text[5:] for text in whole]
    found = generate(gpt, prompts, max_new_tokens=5, adapter_names=["wide", "deep"], num_beams=2, return_logprobs=True)
    for text, logprobs, name in zip(found.sequences, found.logprobs, ("wide", "deep"), strict=True):
        torch.testing.assert_close(logprobs, score(gpt, text, 5, name))


def test_copies_of_a_slot_have_its_adapter_and_a_freed_slot_has_none() -> None:
    gpt, row = adapted(), ids("gpt2")[0].tolist()
    compiled = gpt.compile_for_inference("float32")
    for runner in (compiled.runner(4), TorchRunner(gpt, 4, 60)):
        wanted = runner.extend(runner.allocate(1, "wide"), [row])[0]
        (slot,) = runner.allocate(1, "wide")
        runner.extend([slot], [row[:-1]])
        (fork,) = runner.fork(slot, 1)
        (other,) = runner.allocate(1, "deep")
        runner.copy([other], [slot])
        for used in (fork, other):
            torch.testing.assert_close(runner.extend([used], [row[-1:]])[0], wanted, rtol=1e-4, atol=1e-4)
            runner.free(used)
        base = runner.extend(runner.allocate(1, "__base__"), [row])[0]
        torch.testing.assert_close(base, compiled.logits([row], ["__base__"])[0, -1], rtol=1e-4, atol=1e-4)


CHANGES = {
    "set_adapter": lambda gpt: gpt.set_adapter("wide"),
    "both": lambda gpt: gpt.set_adapter(["wide", "deep"]),
    "disabled": lambda gpt: gpt.disable_adapters(),
    "deleted": lambda gpt: gpt.delete_adapter("deep"),
    "in place": lambda gpt: gpt.h[0].attn.c_attn.lora_B["deep"].weight.detach().mul_(2.0),
    "through data": lambda gpt: gpt.h[0].attn.c_attn.lora_A["deep"].weight.data.mul_(2.0),
    "through numpy": lambda gpt: gpt.h[0].attn.c_attn.lora_A["deep"].weight.detach().numpy().__imul__(2.0),
    "another scale": lambda gpt: setattr(gpt.h[0].attn.c_attn.lora_A["deep"], "scale", 9.0),
    "merged": lambda gpt: gpt.merge_adapter("wide"),
    "the base": lambda gpt: gpt.wte.weight.data.mul_(1.5),
    "a new one": lambda gpt: gpt.add_adapter(LoraConfig(r=2, init_lora_weights=False), "new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_stale_is_used_after_a_change(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the base is packed again only where it has changed."""
    packs, original = [], gptfast.engine.transparent.compile_model
    monkeypatch.setattr(gptfast.engine.transparent, "compile_model", lambda *a: packs.append(1) or original(*a))
    gpt, given = adapted(), ids("gpt2")[:2]

    def logits() -> Tensor:
        runner = gpt.runner(1, 60)
        assert isinstance(runner, EngineRunner)
        return runner.extend(runner.allocate(), [given[0].tolist()])[0]

    before = logits()
    assert engine_for(gpt) is engine_for(gpt)
    with torch.no_grad():
        CHANGES[change](gpt)
        expected = gpt(given[:1], last_only=True)[0]
    after = logits()
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert len(packs) == (2 if change in ("merged", "the base") else 1)


def test_an_adapter_that_is_loaded_and_unmerged_is_used(tmp_path) -> None:
    gpt = adapted()
    deep = texts(gpt, adapter_names=["deep"] * 6)
    gpt.save_adapter(tmp_path / "deep", "deep")
    gpt.delete_adapter("deep")
    with pytest.raises(ValueError, match="adapter_names has 'deep'"):
        texts(gpt, adapter_names=["deep"] * 6)
    gpt.load_adapter(tmp_path / "deep", "again")
    assert texts(gpt) == texts(gpt, adapter_names=["again"] * 6) == deep
    gpt.merge_adapter()
    for name in ("again", "__base__"):
        with pytest.raises(ValueError, match=r"adapter_names is given while 'again' is merged"):
            texts(gpt, adapter_names=[name] * 6)
    gpt.unmerge_adapter()
    assert texts(gpt) == deep


def test_a_base_in_bfloat16_has_factors_in_float32() -> None:
    gpt = model_of("gpt2")
    gpt = copy.deepcopy(gpt).bfloat16()
    gpt.add_adapter(LoraConfig(r=4, init_lora_weights=False), "one")
    engine = engine_for(gpt)
    assert isinstance(engine, CompiledGPT) and engine.adapters == ("one",) and engine.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "q4"])
def test_factors_are_packed_in_bfloat16_beside_quantised_weights(dtype: str, tmp_path) -> None:
    """Rounded to nearest; by whichever way they come."""
    gpt, given, half = adapted(), ids("gpt2"), dtype not in ("float32", "bfloat16")
    rounded = copy.deepcopy(gpt)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            if ".lora_" in name:
                parameter.copy_(parameter.bfloat16())
    compiled, other = (model.compile_for_inference(dtype) for model in (gpt, rounded))
    wanted = compiled.logits(given, NAMES)
    assert torch.equal(wanted, other.logits(given, NAMES)) == half
    gpt.save_adapter(tmp_path, "deep")
    bare = model_of("gpt2").compile_for_inference(dtype)
    size = bare.nbytes
    bare.load_adapter(tmp_path, "deep")
    assert torch.equal(bare.logits(given, ["deep"] * 6)[2], wanted[2])
    head, c_attn = (11 * (128 + rows) for rows in (320, 384))  # numbers of A and B, r = 11, rows in panels of 32
    layers = gpt.config.n_layer
    assert bare.nbytes - size == (head + layers * c_attn) * (2 if half else 4)


def test_modules_to_save_run_in_torch() -> None:
    gpt = adapted()
    gpt.add_adapter(LoraConfig(r=4, modules_to_save=["wte"], init_lora_weights=False), "tokens")
    with torch.no_grad():
        gpt.wte.modules_to_save["tokens"].weight.mul_(1.5)
    assert isinstance(gpt.runner(1, 9), TorchRunner)
    with pytest.raises(ValueError, match=r"compile_for_inference: the adapter 'tokens' has a copy of its own of wte"):
        gpt.compile_for_inference()
    names = ["tokens", "wide", "__base__", "deep", "tokens", "wide"]
    mixed = texts(gpt, adapter_names=names)
    for n, name in enumerate(names):
        assert mixed[n] == texts(gpt, adapter_names=[name] * 6)[n]


def test_a_scheduler_mixes_adapters() -> None:
    gpt = adapted()
    for model in (gpt, TorchRunner(gpt, 6, 150)):
        scheduler = Scheduler(model, max_rows=4)
        requests = [
            scheduler.submit([1, 2, 3 + n], max_new_tokens=4 + n, adapter=name)
            for n, name in enumerate(["wide", None, "deep", "__base__", "wide"])
        ]
        while scheduler.waiting or scheduler.running:
            scheduler.step(3)
        for request in requests:
            options = {} if request.adapter is None else {"adapter_names": [request.adapter]}
            alone = generate(gpt, [request.prompt], max_new_tokens=request.config.max_new_tokens, **options)
            assert request.sequences[0].tokens == alone[0]


def test_a_running_sequence_keeps_the_adapter_that_is_deleted() -> None:
    compiled, row = adapted().compile_for_inference("float32"), ids("gpt2")[0].tolist()
    wanted = compiled.logits([row], ["wide"])[0, -1]
    runner = compiled.runner(1)
    (slot,) = runner.allocate(1, "wide")
    runner.extend([slot], [row[:-1]])
    compiled.delete_adapter("wide")
    assert compiled.adapters == ("deep",) and compiled.active_adapters == ["deep"]
    assert torch.equal(runner.extend([slot], [row[-1:]])[0], wanted)
    with pytest.raises(ValueError, match="adapter_names has 'wide'"):
        compiled.logits([row], ["wide"])
    assert torch.equal(compiled.with_threads(3).logits([row], ["deep"]), compiled.logits([row], ["deep"]))


def test_bad_names_are_told(tmp_path) -> None:
    gpt = adapted()
    compiled = gpt.compile_for_inference("q4")
    unknown = r"adapter_names has 'no', which is no adapter of this model; it has 'wide', 'deep', '__base__'"
    for model in (gpt, compiled, TorchRunner(gpt, 6, 150)):
        with pytest.raises(ValueError, match=unknown):
            texts(model, adapter_names=["no"] * 6)
        with pytest.raises(ValueError, match=r"adapter_names has 2 names and the batch 6 rows"):
            texts(model, adapter_names=["wide"] * 2)
        with pytest.raises(TypeError, match="expected a list of names, one a row"):
            texts(model, adapter_names="wide")
        with pytest.raises(ValueError, match=unknown):
            stream(model, [[1]], adapter_names=["no"])
        with pytest.raises(ValueError, match=unknown):
            texts(model, adapter_names=["no"] * 6, num_beams=2)
    with pytest.raises(ValueError, match=unknown):
        score(compiled, [1, 2], adapter="no")
    for call in (compiled.set_adapter, compiled.delete_adapter):
        with pytest.raises(ValueError, match="there is no adapter 'no'; the model has 'wide', 'deep'"):
            call("no")
    with pytest.raises(ValueError, match="save: the model has the adapter 'wide', 'deep'"):
        compiled.save(tmp_path / "packed")
    with pytest.raises(ValueError, match="it has '__base__'"):
        texts(model_of("gpt2"), adapter_names=["wide"] * 6)
    plain = texts(model_of("gpt2"))
    assert texts(model_of("gpt2"), adapter_names=["__base__"] * 6) == plain


def test_damaged_factors_are_refused_and_run_in_torch() -> None:
    gpt = adapted()
    with torch.no_grad():
        gpt.h[1].mlp.c_fc.lora_A["wide"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the adapter 'wide' holds nan or infinities"):
        gpt.compile_for_inference()
    assert isinstance(gpt.runner(1, 9), TorchRunner)


def test_the_compiled_part_checks_shapes() -> None:
    from gptfast.engine.adapters import Update, pack, shape_of

    shape = shape_of(model_of("gpt2").config)
    good = Update(0, 1.0, torch.ones(2, 128), torch.ones(384, 2))
    for bad in (
        good._replace(number=9),
        good._replace(number=-1),
        good._replace(a=torch.ones(2, 127)),
        good._replace(b=torch.ones(384, 3)),
        good._replace(a=torch.ones(0, 128), b=torch.ones(384, 0)),
    ):
        with pytest.raises(ValueError, match="matrix"):
            pack("test", "x", [bad], shape, "int8")
    with pytest.raises(ValueError, match="two updates"):
        pack("test", "x", [good, good], shape, "int8")
    other = pack("test", "x", [good], shape, "int8")
    runner = model_of("gpt1").compile_for_inference("float32").runner(1)
    with pytest.raises(ValueError, match="for a model of another shape"):
        runner._cache.add(1, [other])
    assert isinstance(other, _C.Adapter)
    with pytest.raises(ValueError, match="matrix 2 is in a mixture of experts"):
        pack(
            "test",
            "x",
            [Update(2, 1.0, torch.ones(2, 64), torch.ones(150, 2))],
            shape_of(model_of("gptoss").config),
            "int8",
        )


def test_adapters_load_beside_a_packed_file(tmp_path) -> None:
    gpt, given = adapted(), ids("gpt2")
    for name in ("wide", "deep"):
        gpt.save_adapter(tmp_path / name, name)
    wanted = gpt.compile_for_inference("q4").logits(given, NAMES)
    gpt.delete_adapter(["wide", "deep"])
    gpt.compile_for_inference("q4").save(tmp_path / "packed")
    packed = gptfast.engine.load(tmp_path / "packed")
    with pytest.raises(
        ValueError, match=r"the adapter was trained on another base: bf16:\w+ is not this model's bf16:"
    ):
        model_of("odd").compile_for_inference("q4").load_adapter(tmp_path / "wide")
    for name in ("wide", "deep"):
        packed.load_adapter(tmp_path / name, name)
    assert packed.adapters == ("wide", "deep") and packed.active_adapters == ["deep"]
    assert torch.equal(packed.logits(given, NAMES), wanted)
    assert torch.equal(packed.with_threads(2).logits(given, NAMES), wanted)
    with pytest.raises(ValueError, match="name is 'wide'; expected one that no adapter has"):
        packed.load_adapter(tmp_path / "wide", "wide")
    with pytest.raises(FileNotFoundError, match="holds no adapter_config"):
        packed.load_adapter(tmp_path, "more")
    with pytest.raises(ValueError, match=r"A and B of h\.0\.attn\.c_attn are .*; expected \(r, 57\) and \(171, r\)"):
        model_of("odd").compile_for_inference("q4").load_adapter(tmp_path / "wide", any_base=True)


def test_a_packed_base_refuses_what_it_cannot_hold(tmp_path) -> None:
    gpt = copy.deepcopy(model_of("gpt2"))
    gpt.add_adapter(LoraConfig(r=2, modules_to_save=["ln_f"]), "copy")
    gpt.save_adapter(tmp_path / "copy", "copy")
    compiled = model_of("gpt2").compile_for_inference("int8")
    with pytest.raises(
        ValueError, match=r"holds .*ln_f.*: of modules_to_save and biases a packed base has one for all"
    ):
        compiled.load_adapter(tmp_path / "copy")
    assert compiled.adapters == ()
