"""Patched models under transformers' Trainer, the package accelerate, and peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gptfast
from gptfast.integrations.causal_lm import Head
from gptfast.integrations.swap import original_class
from tests.support.hf_models import T, V, hf_model, padded

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("accelerate")

IDS, _ = padded("none")


class Texts(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        ids = torch.randint(3, V, (T,), generator=torch.Generator().manual_seed(n))
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def train(tmp_path: Any, patch: bool, **options: Any) -> tuple[list[float], dict[str, float], dict[str, Tensor]]:
    """Losses, evaluation and weights of a short run."""
    model = hf_model()
    if patch:
        gptfast.accelerate(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        learning_rate=1e-2,
        seed=3,
        **options,
    )
    accuracy = lambda result: {"accuracy": float((result.predictions[:, :-1] == result.label_ids[:, 1:]).mean())}  # noqa: E731
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Texts(),
        eval_dataset=Texts(),
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: (
            logits[0] if isinstance(logits, tuple) else logits
        ).argmax(-1),
    )
    trainer.train()
    measured = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, measured, dict(model.state_dict())


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"bf16": True}],
    ids=["plain", "accumulation", "checkpointing", "bf16"],
)
def test_trainer_gives_the_losses_metrics_and_weights_of_the_unpatched_model(tmp_path: Any, options: dict[str, Any]):
    config = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    runs = []
    for patch in (False, True):
        original, globals()["hf_model"] = hf_model, lambda: original(**config)  # noqa: B023
        try:
            runs.append(train(tmp_path, patch, **options))
        finally:
            globals()["hf_model"] = original
    (losses, measured, weights), (our_losses, our_measured, our_weights) = runs
    tolerance = 0.05 if options.get("bf16") else 2e-4
    assert our_losses == pytest.approx(losses, rel=tolerance)
    assert our_measured["eval_loss"] == pytest.approx(measured["eval_loss"], rel=tolerance)
    assert our_measured["eval_accuracy"] == pytest.approx(
        measured["eval_accuracy"], abs=0.1 if options.get("bf16") else 0.02
    )
    if not options.get("bf16"):
        for name, value in weights.items():
            assert (our_weights[name] - value).norm() <= 2e-2 * value.norm(), name


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("loss_only", [True, False])
def test_evaluation_makes_logits_where_they_are_read(tmp_path: Any, monkeypatch: Any, loss_only: bool, bf16: bool):
    """Trainer lists `outputs.items()` in every evaluation, also in one that keeps nothing but the loss."""
    made = []
    compute = Head.forward

    def forward(self: Any, input: Tensor) -> Tensor:
        logits = compute(self, input)
        made.append(logits.numel())
        return logits

    monkeypatch.setattr(Head, "forward", forward)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_eval_batch_size=4,
        report_to=[],
        use_cpu=True,
        prediction_loss_only=loss_only,
        bf16=bf16,
    )
    expected = transformers.Trainer(model=hf_model(), args=arguments).predict(Texts())
    model = hf_model()
    gptfast.accelerate(model)
    measured = transformers.Trainer(model=model, args=arguments).predict(Texts())
    # both sides round to bf16: relative differences of up to 3e-4 were measured
    assert measured.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=2e-3 if bf16 else 1e-5)
    assert sum(made) == (0 if loss_only else 12 * T * V)
    if not loss_only:
        logits = measured.predictions[0] if isinstance(measured.predictions, tuple) else measured.predictions
        assert logits.shape == (12, T, V)


@pytest.mark.parametrize("bf16", [False, True])
def test_training_makes_no_logits(tmp_path: Any, monkeypatch: Any, bf16: bool):
    """accelerate lists the outputs of every step in mixed precision, to make them fp32."""
    made = []
    compute = Head.forward
    monkeypatch.setattr(Head, "forward", lambda self, x: made.append(compute(self, x)) or made[-1])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no", bf16=bf16
    )
    model = hf_model()
    gptfast.accelerate(model)
    transformers.Trainer(model=model, args=arguments, train_dataset=Texts()).train()
    assert len(made) == 2 and sum(logits.numel() for logits in made) == 0


def test_trainer_that_makes_its_model(tmp_path: Any):
    """`model_init`, which hyperparameter search calls for every run, and reads the class of."""

    def model_init() -> Any:
        model = hf_model()
        gptfast.accelerate(model)
        return model

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, seed=3
    )
    trainer = transformers.Trainer(model_init=model_init, args=arguments, train_dataset=Texts())
    first = trainer.train().training_loss
    one = trainer.model
    assert trainer.train().training_loss == first  # the same run once more
    assert trainer.model is not one
    assert all(original_class(m) and original_class(m.transformer.h[1].attn) for m in (one, trainer.model))
    again = type(one).from_pretrained(str(tmp_path / "checkpoint-2"))
    assert original_class(again) is None and torch.equal(again.lm_head.weight, trainer.model.lm_head.weight)


def test_the_forward_of_mixed_precision_is_told_and_undone(tmp_path: Any):
    """accelerate leaves its forward on the model after training."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", bf16=True
    )
    model = hf_model()
    gptfast.accelerate(model)
    transformers.Trainer(model=model, args=arguments, train_dataset=Texts()).train()
    with pytest.raises(
        RuntimeError, match=r"a Trainer with bf16, by `del model\.forward, model\._is_accelerate_prepared`"
    ):
        gptfast.restore(model)
    del model.forward, model._is_accelerate_prepared  # without the second, the next run would not be in bf16
    gptfast.restore(model)
    transformers.Trainer(model=model, args=arguments, train_dataset=Texts()).train()
    report = gptfast.accelerate(model)  # which is not reached by what runs the forward on the instance
    assert report.skipped[""] == "its forward was replaced on the instance" and "" not in report.replaced
    assert original_class(model) is None and original_class(model.transformer)


LORA = {"r": 4, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "init_lora_weights": False}


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(7)
    return peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **options}, task_type="CAUSAL_LM")).eval()


def step(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    outputs = model(input_ids=IDS, labels=IDS)
    outputs.loss.backward()
    grads = {name.replace(".base_layer", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), **grads}


def check_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1e-3), msg=name)


@pytest.mark.parametrize("order", ["adapters first", "patch first"])
def test_lora_before_and_after_patching(order: str):
    expected = step(lora(hf_model()))
    model = hf_model()
    if order == "patch first":
        gptfast.accelerate(model)
        adapted = lora(model)
    else:
        adapted = lora(model)
        report = gptfast.accelerate(adapted)
        assert any("base_layer" in name for name in report.replaced)
    check_same(step(adapted), expected)
    with adapted.disable_adapter():
        off = adapted(input_ids=IDS).logits
    torch.testing.assert_close(off, hf_model()(IDS).logits, rtol=1e-4, atol=1e-4)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(
        merged(IDS).logits, lora(hf_model()).merge_and_unload()(IDS).logits, rtol=1e-3, atol=1e-3
    )
    gptfast.restore(merged)
    assert not any(original_class(module) for module in merged.modules())


def test_lora_on_the_head_trains():
    options = {"target_modules": ["lm_head"], "fan_in_fan_out": False}
    expected = step(lora(hf_model(tie_word_embeddings=False), **options))
    model = hf_model(tie_word_embeddings=False)
    gptfast.accelerate(model)
    got = step(lora(model, **options))
    check_same(got, expected)
    assert any("lm_head" in name and bool(value.any()) for name, value in got.items())


def test_prompt_tuning():
    config = peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM")
    plain, patched = hf_model(), hf_model()
    gptfast.accelerate(patched)
    results = []
    for model in (plain, patched):
        torch.manual_seed(2)
        results.append(step(peft.get_peft_model(model, config).eval()))
    check_same(results[1], results[0])
