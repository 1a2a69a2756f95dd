"""torch.compile of task models: one graph, with the results of eager mode."""

from __future__ import annotations

import pytest
import torch

from tests.finetuning.models import EXAMPLES, task_model


@pytest.mark.parametrize("task", ["classification", "choice"])
def test_a_task_model_is_one_graph(task: str):
    torch.compiler.reset()
    model = task_model(task)
    batch = model.batch(EXAMPLES[task])
    assert (batch["ids"] == model.special_tokens["pad"]).any(), "the test needs padding"
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if task == "classification":
        torch.testing.assert_close(compiled(batch["ids"]).logits, model(batch["ids"]).logits)
    found, wanted = compiled(**batch), model(**batch)
    for name in ("logits", "loss", "task_loss", "lm_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(wanted, name), msg=name)
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(out.loss, parameters) for out in (found, wanted)]
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(
            ours, expected, rtol=1e-5, atol=1e-6
        )  # measured: 6e-8 apart, of sums in another order


def test_places_that_the_head_reads_are_an_input_of_the_graph():
    torch.compiler.reset()
    model = task_model("classification")
    batch = model.batch(EXAMPLES["classification"], labels=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for places in (torch.tensor([1, 2]), torch.tensor([3, 0])):
        given = {**batch, "mc_token_ids": places}
        torch.testing.assert_close(compiled(**given).logits, model(**given).logits)
    with pytest.raises(ValueError, match="expected positions in"):
        model(**batch, mc_token_ids=torch.tensor([0, 99]))
    with pytest.raises(ValueError, match=r"expected int64 indices in \[0, 2\)"):
        model(**batch, labels=torch.tensor([0, 2]))


@pytest.mark.parametrize("task", ["classification", "choice"])
def test_a_graph_refuses_labels_outside_the_set(task: str):
    torch.compiler.reset()
    model = task_model(task)
    batch = model.batch(EXAMPLES[task])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(**batch)
    for labels in ([0, 2], [-1, 0], [-100, 1]):  # -100 is what cross_entropy leaves out
        with pytest.raises(RuntimeError, match="labels has an index outside its range"):
            compiled(**{**batch, "labels": torch.tensor(labels)})
    with pytest.raises(RuntimeError, match="mc_token_ids has an index outside its range"):
        compiled(**batch, mc_token_ids=torch.full(batch["ids"].shape[:-1], -1))
