"""Compares a patched model with itself unpatched, on a batch of the user's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.integrations.modules import is_wrapped

TINY = 3e-7  # below this part of the largest value an error is rounding of float32, in either model
ROUNDS = 5
LABELS = ("labels", "targets")  # of transformers, of nanoGPT and minGPT


def check_batch(model: nn.Module, batch: Any) -> None:
    """Raise TypeError, ValueError where a model cannot be verified with a batch."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"accelerate: verify is a {type(batch).__name__}; expected a dict of the model's arguments, such as "
            "{'input_ids': ids, 'labels': ids}"
        )
    if all(batch.get(name) is None for name in LABELS):
        raise ValueError(
            f"accelerate: verify has no labels (it has {', '.join(map(str, batch)) or 'nothing'}), so there is no loss to "
            "compare; add them, for a language model labels=input_ids, and targets for nanoGPT and minGPT"
        )
    device = next((parameter.device for parameter in model.parameters()), None)
    for name, value in batch.items():
        if isinstance(value, Tensor) and device is not None and value.device != device:
            raise ValueError(
                f"accelerate: verify has {name} on the device {value.device} and the model is on {device}; move the batch there"
            )


def verified(
    model: nn.Module, batch: Mapping[str, Any], patch: Callable[[], None], undo: Callable[[], None]
) -> tuple[dict[str, float], float]:
    """Patch the model, and compare loss, logits and all gradients before and after with those in float64.

    Both run in evaluation mode, where dropout does not blur the comparison, and with gradients, also under `torch.no_grad`; a
    model whose parameters are all frozen has none, and loss and logits are compared. Afterwards the model is patched, and has
    the mode and the gradients that it had.

    Args:
        patch, undo: undo may be called of a model that is not patched.
    Returns:
        (name -> error after in units of the error before, time before over time after).
    """
    kept = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    state = torch.get_rng_state()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            model.eval()
            batch = {n: x.clone() if isinstance(x, Tensor) and x.is_inference() else x for n, x in batch.items()}
            exact = _unpatched(model, batch)
            before, seconds = _results(model, batch), _Timing(model, batch)
            patch()
            after = _results(model, batch)
            speedup = seconds.compare(patch, undo)
    except BaseException:
        undo()
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, grad in kept:
            parameter.grad = grad
        torch.set_rng_state(state)
    errors = {name: _units(after[name], before[name], value) for name, value in exact.items()}
    return errors, speedup


def _results(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Loss, logits and gradients, by name."""
    for parameter in model.parameters():
        parameter.grad = None
    dtype = next(
        (p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32
    )  # quantised ones are not
    loss, logits = _loss_and_logits(model(**_cast(batch, dtype)))
    _backward(loss)
    return _found(loss, logits, batch, model.named_parameters())


def _backward(loss: Tensor) -> None:
    if loss.requires_grad:  # not of a model whose parameters are all frozen
        loss.backward()


def _unpatched(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The results in float64. Raises ValueError where torch raises IndexError or KeyError, as for an id outside the vocabulary."""
    try:
        return _exact(model, batch)
    except LookupError as error:
        raise ValueError(
            f"accelerate: the unpatched model does not run on the verify batch: {type(error).__name__}: {error}; give one that it "
            "takes"
        ) from error


def _exact(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The results in float64. The parameters stand in for the model's own, as not every model can be copied: minGPT's blocks
    hold functions of the modules that they were made with."""
    own = {
        name: p for name, p in model.named_parameters() if p.is_floating_point() and not is_wrapped(p)
    }  # not quantised
    doubles = {name: p.detach().double().requires_grad_(p.requires_grad) for name, p in own.items()}
    buffers = {name: x.double() if x.is_floating_point() else x for name, x in model.named_buffers()}
    outputs = torch.func.functional_call(model, {**doubles, **buffers}, (), _cast(batch, torch.float64))
    loss, logits = _loss_and_logits(outputs)
    if not loss.isfinite():
        raise ValueError(
            f"accelerate: the loss of the verify batch is {loss.item()}, so there is nothing to compare; it needs a label that "
            "counts (-100, or nanoGPT's -1, is ignored), for a language model one after the first position"
        )
    _backward(loss)
    return _found(loss, logits, batch, doubles.items())


def _cast(batch: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in batch.items()}


def _loss_and_logits(outputs: Any) -> tuple[Tensor, Tensor]:
    return _loss(outputs), outputs.logits if hasattr(outputs, "logits") else _tensors(outputs)[1][0]


def _loss(outputs: Any) -> Tensor:
    """Of transformers' outputs, whose logits are not read here, or of the tuple that nanoGPT and minGPT return."""
    if isinstance(getattr(outputs, "loss", None), Tensor):
        return outputs.loss
    scalars, others = _tensors(outputs)
    if not scalars or not others:
        raise ValueError(
            f"accelerate: the model returned a {type(outputs).__name__} of the verify batch without a loss; expected an output "
            "with loss and logits, or a tuple that holds both"
        )
    return scalars[0]


def _tensors(outputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """The scalars of a tuple, and the others."""
    every = [x for x in outputs if isinstance(x, Tensor)] if isinstance(outputs, tuple | list) else []
    return [x for x in every if x.dim() == 0], [x for x in every if x.dim() > 0]


def _found(loss: Tensor, logits: Tensor, batch: Mapping[str, Any], parameters: Iterable[Any]) -> dict[str, Tensor]:
    mask, logits = batch.get("attention_mask"), logits.detach()
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool()]  # those of padding mean nothing
    found = {"loss": loss.detach().clone(), "logits": logits.clone()}
    return found | {name: p.grad.detach().clone() for name, p in parameters if p.grad is not None}


def _units(after: Tensor, before: Tensor, exact: Tensor) -> float:
    """Largest error after in units of the largest before."""
    scale = TINY * exact.abs().max().clamp_min(1e-30)
    worst = (after.double() - exact).abs().max()
    return float(worst / (before.double() - exact).abs().max().clamp_min(scale))


class _Timing:
    """Medians of steps of the patched and the unpatched model, in turns."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Any]) -> None:
        self.model, self.batch = model, batch

    def compare(self, patch: Callable[[], None], undo: Callable[[], None]) -> float:
        """Time without the patch over time with it; the model is patched before and after."""
        self.model.train()
        with_patch, without = [], []
        for _ in range(ROUNDS):
            with_patch.append(self._step())
            undo()
            without.append(self._step())
            patch()
        return statistics.median(without) / statistics.median(with_patch)

    def _step(self) -> float:
        device = next(self.model.parameters()).device
        begin = time.perf_counter()
        _backward(_loss(self.model(**self.batch)))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        self.model.zero_grad(set_to_none=True)
        return seconds
