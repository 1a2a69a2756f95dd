"""The engine, captured steps and checkpoints hold for the model as it stands, or say what is different about it."""

from __future__ import annotations

import copy
import json
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.dlpack import to_dlpack
from transformers import AutoModelForCausalLM

import gptfast
from gptfast import GPT, GPTConfig
from gptfast.backend import cpu_isas
from gptfast.engine import engine_for, forget
from gptfast.engine.transparent import checksum
from gptfast.generation import Scheduler
from gptfast.nn.difference import difference
from gptfast.nn.embeddings import Embeddings
from tests.support.schedulers import run

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=24, vocab_size=61, dropout=0.0)
PROMPT = [3, 1, 4, 1, 5]


def make(config: GPTConfig = CONFIG, kind: type[GPT] = GPT) -> GPT:
    torch.manual_seed(7)
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from one another, so that any change is seen
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@torch.no_grad()
def plain_logprobs(model: GPT, count: int = 5) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log-probabilities by whole forwards of the module, without a cache."""
    tokens, logprobs = list(PROMPT), []
    for _ in range(count):
        last = model(torch.tensor([tokens], dtype=torch.int64))[0, -1].log_softmax(-1)
        tokens.append(int(last.argmax()))
        logprobs.append(float(last.max()))
    return tokens, logprobs


def assert_generates_as_it_stands(model: GPT) -> None:
    """Also in the engine's own loop, and step by step."""
    tokens, logprobs = plain_logprobs(model)
    assert model.generate([PROMPT], max_new_tokens=5, temperature=0) == [tokens]
    made = model.generate([PROMPT], max_new_tokens=5, temperature=0, return_logprobs=True)
    assert made.sequences == [tokens]
    assert made.logprobs[0] == pytest.approx(logprobs, abs=2e-4)


# ---- values ---------------------------------------------------------------------------------------------------------


def through_a_view(model: GPT) -> None:
    model.wte.weight.detach().numpy()[19] = 2.0


def through_inference_mode(model: GPT) -> None:
    with torch.inference_mode():
        model.h[1].ln_2.bias[3] = 9.0


VALUES: dict[str, Callable[[GPT], object]] = {
    "a row through data": lambda m: m.wte.weight.data[18].copy_(3 * torch.randn(32)),
    "one value of a bias": lambda m: m.h[0].mlp.c_fc.bias.data[3:4].fill_(50.0),
    "the last value": lambda m: m.lm_head.weight.data[-1, -1:].fill_(-30.0),
    "numpy": through_a_view,
    "inference mode": through_inference_mode,
    "no_grad": lambda m: nn.init.normal_(m.h[1].attn.c_attn.weight),
    "two rows that change places": lambda m: m.wte.weight.data.copy_(
        m.wte.weight.data[[*range(3), 4, 3, *range(5, 61)]]
    ),
    "every sign": lambda m: m.h[0].attn.c_proj.weight.data.neg_(),
    "other positions": lambda m: m.wpe.weight.data.add_(0.5 * torch.randn(24, 32)),
    "load_state_dict": lambda m: m.load_state_dict(make().bfloat16().float().state_dict()),
}


@pytest.mark.parametrize("change", VALUES)
def test_generation_follows_every_value(change: str) -> None:
    model = make()
    assert_generates_as_it_stands(model)
    first = engine_for(model)
    VALUES[change](model)
    assert_generates_as_it_stands(model)
    assert first is not None and engine_for(model) is not first, "the packed copy is a new one"


def test_a_fixed_embedding_is_a_weight_too() -> None:
    model = make(CONFIG.replace(position_embedding="sinusoidal"))
    assert_generates_as_it_stands(model)
    model.wpe.weight.data[2].mul_(-1.0)
    assert_generates_as_it_stands(model)


def test_equal_weights_need_no_other_copy() -> None:
    model = make()
    first = engine_for(model)
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()})
    model.wte.weight.data = model.wte.weight.data.clone()
    model.tie_weights()
    assert engine_for(model) is first
    forget(model)
    assert engine_for(model) is not first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checksum_sees_any_bit_and_any_exchange(dtype: torch.dtype) -> None:
    def marks(n: int, change: Callable[[torch.Tensor], object]) -> tuple[int, int]:
        x = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
        before = checksum([x])
        change(x)
        return before, checksum([x])

    bits = torch.int32 if dtype == torch.float32 else torch.int16
    for n in (1, 3, 63, 64, 129, 3 * 64 + 5):
        for place in range(n):
            for bit in (0, 7, torch.iinfo(bits).bits - 1):
                flip = torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(bits)
                before, after = marks(n, lambda x, i=place, f=flip: x.view(bits)[i : i + 1].bitwise_xor_(f))
                assert before != after, (n, place, bit)
    for i, j in ((0, 1), (0, 2), (1, 64), (5, 133), (0, 300), (17, 145)):
        exchange = [j if k == i else i if k == j else k for k in range(301)]
        before, after = marks(301, lambda x, e=exchange: x.copy_(x[e].clone()))
        assert before != after, (i, j)
    for change in (lambda x: x.neg_(), lambda x: x[::2].neg_(), lambda x: x[1::2].neg_(), lambda x: x.mul_(0)):
        before, after = marks(4096, change)
        assert before != after
    zeros = torch.zeros(300, dtype=dtype)
    before = checksum([zeros])
    zeros[7] = -0.0
    assert checksum([zeros]) != before
    assert checksum([zeros, zeros[:0]]) != checksum([zeros]) != checksum([zeros[:299]])


def test_the_checksum_is_that_of_every_thread_count_and_instruction_set(threads: None) -> None:
    from gptfast import _C

    x = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1))  # twelve pieces, shared among threads
    torch.set_num_threads(1)
    expected = checksum([x, x[5:70]])
    for isa in cpu_isas():
        for count in (1, 2, 5):
            assert _C.checksum([to_dlpack(x), to_dlpack(x[5:70])], count, isa) == expected, (isa, count)
    with pytest.raises(ValueError, match="checksum: expected a contiguous tensor on the CPU"):
        _C.checksum([to_dlpack(x[::2])], 1, "scalar")
    assert checksum([x.view(-1)[::2], x[5:70]]) == checksum([x.view(-1)[::2].contiguous(), x[5:70]])


# ---- modules --------------------------------------------------------------------------------------------------------


class Lora(gptfast.nn.Linear):
    def forward(self, input):
        out = super().forward(input)
        return out + 0.5 * out.roll(1, -1)


class Louder(GPT):
    def forward(self, *args, **kwargs):
        return 3 * super().forward(*args, **kwargs)


class Mixin:
    def push_to_hub(self) -> None: ...


class Named(Mixin, GPT):
    def describe(self) -> str:
        return f"{self.num_parameters()} parameters"


def with_lora(model: GPT) -> None:
    for block in model.h:
        block.mlp.c_proj.__class__ = Lora


def cut(model: GPT) -> None:
    model.h = model.h[:1]


def append(model: GPT) -> None:
    model.h.append(copy.deepcopy(model.h[0]))


def exchange_blocks(model: GPT) -> None:
    model.h = nn.ModuleList([model.h[1], model.h[0]])


def patch_forward(model: GPT) -> None:
    forward = model.h[0].mlp.forward
    model.h[0].mlp.forward = lambda x: 2 * forward(x)


def patch_private(model: GPT) -> None:
    embed = model._embed
    model._embed = types.MethodType(lambda self, ids, positions: 2 * embed(ids, positions), model)


def patch_whole(model: GPT) -> None:
    forward = model.forward
    model.forward = lambda *args, **kwargs: 2 * forward(*args, **kwargs)


def all_of(name: str, attribute: str, value: object) -> Callable[[GPT], None]:
    def change(model: GPT) -> None:
        for module in model.modules():
            if type(module).__name__ == name:
                setattr(module, attribute, value)

    return change


def reshape_norm(model: GPT) -> None:
    model.h[0].ln_1 = nn.LayerNorm(32)


def more_bias(model: GPT) -> None:
    model.lm_head.bias = nn.Parameter(torch.randn(61))


def no_bias(model: GPT) -> None:
    model.h[1].mlp.c_fc.bias = None


def wider(model: GPT) -> None:
    model.h[0].mlp.c_fc = gptfast.nn.Linear(32, 96, activation="gelu_tanh").eval()
    model.h[0].mlp.c_proj = gptfast.nn.Linear(96, 32).eval()


MODULES: dict[str, tuple[Callable[[GPT], object], str]] = {
    "eps": (all_of("LayerNorm", "eps", 10.0), r"ln_f has eps=10\.0 and the config says 1e-05"),
    "one eps": (lambda m: setattr(m.ln_f, "eps", 1.0), r"ln_f has eps=1\.0"),
    "window": (all_of("CausalSelfAttention", "window", 1), r"h\.0\.attn has window=1 and the config says None"),
    "activation": (lambda m: setattr(m.h[1].mlp.c_fc, "activation", None), r"h\.1\.mlp\.c_fc has activation=None"),
    "activation of the head": (lambda m: setattr(m.lm_head, "activation", "gelu"), "lm_head has activation='gelu'"),
    "cut": (cut, "h has 1 blocks and the config says n_layer=2"),
    "appended": (append, "h has 3 blocks and the config says n_layer=2"),
    "lora": (with_lora, r"h\.0\.mlp\.c_proj is a .*Lora; the config says gptfast\.nn\.linear\.Linear"),
    "forward hook": (
        lambda m: m.h[0].register_forward_hook(lambda *a: (a[2][0], 2 * a[2][1])),
        "h.0 has a forward hook",
    ),
    "pre-hook": (
        lambda m: m.ln_f.register_forward_pre_hook(lambda _, a: (a[0] * 2, *a[1:])),
        "ln_f has a forward hook",
    ),
    "parametrised": (
        lambda m: nn.utils.parametrize.register_parametrization(m.h[0].mlp.c_fc, "weight", nn.Hardtanh()),
        r"h\.0\.mlp\.c_fc is a .*ParametrizedLinear",
    ),
    "weight norm": (lambda m: nn.utils.parametrizations.weight_norm(m.h[0].attn.c_attn), r"c_attn is a .*Parametrized"),
    "pruned": (
        lambda m: prune.l1_unstructured(m.h[0].attn.c_attn, "weight", 0.5),
        "c_attn has a forward hook",
    ),
    "patched": (patch_forward, r"h\.0\.mlp has forward replaced on the instance"),
    "patched inside": (patch_private, "the model has _embed replaced on the instance"),
    "patched as a whole": (patch_whole, "the model has forward replaced on the instance"),
    "another norm": (reshape_norm, r"h\.0\.ln_1 is a torch\.nn.*LayerNorm; the config says gptfast\.nn"),
    "head with a bias": (more_bias, r"lm_head has bias, a tensor of \(61,\), and the config says none"),
    "no bias": (no_bias, r"h\.1\.mlp\.c_fc has no bias of its own"),
    "wider": (wider, r"h\.0\.mlp\.c_fc has weight of shape \(96, 32\) and the config says \(128, 32\)"),
    "head of heads": (lambda m: m.add_module("value", nn.Linear(32, 1)), "value, a Linear, has no place"),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_changed_module_answers_as_it_stands_or_is_refused(name: str, tmp_path: Path) -> None:
    change, told = MODULES[name]
    model = make()
    model.save_pretrained(tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert engine_for(model) is not None, "packed, so that an old copy is there"
    change(model.eval())
    model.eval()
    if name != "another norm":  # torch's own takes no residual: the model itself is broken
        assert_generates_as_it_stands(model)
    with pytest.raises(ValueError, match=rf"compile_for_inference: .*{told}.*GPT\.generate"):
        model.compile_for_inference("float32")
    with pytest.raises(ValueError, match=rf"save_pretrained: .*{told}.*nothing was written"):
        model.save_pretrained(tmp_path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before, "the old checkpoint is as it was"
    scheduler = Scheduler(model)
    if name != "another norm":
        request = scheduler.submit(PROMPT, max_new_tokens=5, temperature=0)
        run(scheduler)
        assert request.sequences[0].tokens == plain_logprobs(model)[0]


def test_a_class_whose_forward_is_replaced_or_overridden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    louder, model = make(kind=Louder), make()
    assert difference(louder) == "the model is a Louder, in which Louder overrides forward"
    assert_generates_as_it_stands(louder)
    with pytest.raises(ValueError, match="Louder overrides forward"):
        louder.save_pretrained(tmp_path / "louder")
    assert not (tmp_path / "louder").exists()
    assert_generates_as_it_stands(model)
    forward = gptfast.nn.MLP.forward
    monkeypatch.setattr(gptfast.nn.MLP, "forward", lambda self, x: 2 * forward(self, x))
    assert difference(model) == "a method of the class MLP was replaced"
    assert_generates_as_it_stands(model)


def test_a_class_that_hides_a_module_or_changes_gpt_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hidden(gptfast.GPT):
        """Its forward finds the attribute of the class before the module of that name."""

    hidden, model = make(kind=Hidden), make()
    with monkeypatch.context() as patched:
        patched.setattr(Embeddings, "_embed", lambda self, *args: 2 * self.wte(args[0]))
        assert difference(model) == "a method of the class Embeddings was replaced"
    Hidden.lm_head = property(lambda self: lambda x: 2 * self._modules["lm_head"](x))
    assert difference(hidden) == "the model is a Hidden, in which Hidden overrides lm_head"
    monkeypatch.setattr(gptfast.GPT, "generate", lambda *_: None)
    assert difference(model) is None, "no forward calls it"
    forward = gptfast.GPT.forward
    monkeypatch.setattr(gptfast.GPT, "forward", lambda *args, **options: 2 * forward(*args, **options))
    assert difference(model) == "the model is a GPT, in which GPT overrides forward"


def test_a_subclass_with_more_methods_is_a_gpt(tmp_path: Path) -> None:
    model = make(kind=Named)
    assert difference(model, saved=True) is None and engine_for(model) is not None
    model.save_pretrained(tmp_path)
    assert torch.equal(Named.from_pretrained(tmp_path).wte.weight, model.wte.weight)


def test_hooks_of_all_modules() -> None:
    model = make()
    assert_generates_as_it_stands(model)
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, _, out: 2 * out if type(module) is gptfast.nn.MLP else None
    )
    try:
        assert difference(model) == "a forward hook of all modules (torch.nn.modules.module) is registered"
        assert_generates_as_it_stands(model)
    finally:
        handle.remove()
    assert difference(model) is None


def test_blocks_in_another_order_are_another_model(tmp_path: Path) -> None:
    """Nothing is lost of it: weights go by their place."""
    model = make()
    assert_generates_as_it_stands(model)
    exchange_blocks(model)
    assert difference(model) is None
    assert_generates_as_it_stands(model)
    model.save_pretrained(tmp_path)
    assert plain_logprobs(GPT.from_pretrained(tmp_path)) == plain_logprobs(model)
    with torch.no_grad():
        banded = make(CONFIG.replace(attention_pattern="alternating", window=3))
        exchange_blocks(banded)
    assert difference(banded) == "h.0.attn has window=3 and the config says None"
    assert_generates_as_it_stands(banded)


def test_a_block_that_runs_twice(tmp_path: Path) -> None:
    model = make()
    model.h = nn.ModuleList([model.h[0], model.h[0]])
    assert_generates_as_it_stands(model)
    with gptfast.backend("eager"):
        assert_generates_as_it_stands(model)
    model.save_pretrained(tmp_path)
    assert plain_logprobs(GPT.from_pretrained(tmp_path)) == plain_logprobs(model)


def untie(model: GPT) -> None:
    model.lm_head.weight = nn.Parameter(torch.randn(61, 32))


def untie_by_loading(model: GPT) -> None:
    state = {name: x.clone() for name, x in model.state_dict().items()}
    state["lm_head.weight"] = torch.randn(61, 32)
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("change", [untie, untie_by_loading])
def test_a_head_of_its_own(change: Callable[[GPT], None], tmp_path: Path) -> None:
    model = make()
    assert_generates_as_it_stands(model)
    change(model)
    assert_generates_as_it_stands(model)
    compiled = model.compile_for_inference("float32")
    assert not compiled.config.tie_weights
    ids = torch.tensor([PROMPT], dtype=torch.int64)
    assert torch.allclose(compiled.logits(ids), model(ids), atol=1e-4)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(GPT.from_pretrained(tmp_path)(ids), model(ids))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(theirs(ids).logits, model(ids), atol=1e-4)


def test_one_tensor_under_two_names_is_tied(tmp_path: Path) -> None:
    model = make(CONFIG.replace(tie_weights=False))
    model.lm_head.weight = model.wte.weight
    assert_generates_as_it_stands(model)
    model.save_pretrained(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.tie_weights
    assert plain_logprobs(GPT.from_pretrained(tmp_path)) == plain_logprobs(model)


def test_what_only_a_checkpoint_would_lose(tmp_path: Path) -> None:
    model = make()
    model.h[0].attn.attn_pdrop = 0.5
    assert difference(model) is None and engine_for(model) is not None, "nothing drops out of a generation"
    with pytest.raises(ValueError, match=r"h\.0\.attn has attn_pdrop=0\.5 and the config says 0\.0"):
        model.save_pretrained(tmp_path / "x")
    fixed = make(CONFIG.replace(position_embedding="sinusoidal"))
    fixed.wpe.weight.data[1].zero_()
    with pytest.raises(ValueError, match="wpe has other values than the config's sinusoids"):
        fixed.save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_heads_that_no_cache_has_room_for() -> None:
    model = make()
    all_of("CausalSelfAttention", "n_head", 1)(model)
    all_of("CausalSelfAttention", "head_dim", 32)(model)
    with pytest.raises(
        ValueError, match="layer 0 has 1 heads of 32 channels, and the config says 2 layers with 2 heads"
    ):
        model.generate([PROMPT], max_new_tokens=2)


def test_a_forward_that_leaves_the_cache_unused() -> None:
    model = make()
    forward = model.forward
    model.forward = lambda ids, targets=None, **_: forward(ids, targets)
    with pytest.raises(RuntimeError, match="does not use its cache= argument"):
        model.generate([PROMPT], max_new_tokens=2)


def test_the_loss_in_training_goes_through_a_changed_head() -> None:
    model = make().train()
    ids = torch.tensor([PROMPT], dtype=torch.int64)
    _, plain = model(ids, ids)
    model.lm_head.__class__ = Lora
    _, loss = model(ids, ids)
    expected = nn.functional.cross_entropy(model(ids)[0], ids[0])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and loss.item() != pytest.approx(
        plain.item(), rel=1e-4
    )


def test_an_assistant_guesses_as_it_stands() -> None:
    """The text is the model's own whatever it guesses; its guesses come from the modules that it has."""
    model, assistant = make(), make()
    all_of("LayerNorm", "eps", 10.0)(assistant)
    tokens = model.generate([PROMPT], max_new_tokens=5, temperature=0)
    assert model.generate([PROMPT], max_new_tokens=5, temperature=0, assistant_model=assistant) == tokens
    assert engine_for(assistant) is None
