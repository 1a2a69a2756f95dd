"""Metrics of predictions, by scikit-learn and scipy: accuracy, macro F1, Matthews, and the correlations of scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Values = Sequence[Any] | np.ndarray | Tensor


def accuracy(labels: Values, predictions: Values) -> float:
    """Part of the predictions that are right, in [0, 1].

    Args:
        labels: (N,) true labels: numbers or texts.
        predictions: (N,) predicted labels.
    Raises:
        ValueError: two lengths, or nothing in them.  ImportError: scikit-learn is not installed.
    """
    return float(_sklearn("accuracy_score")(*_checked("accuracy", labels, predictions)))


def macro_f1(labels: Values, predictions: Values) -> float:
    """Mean over all classes of F1, each class of one weight, in [0, 1]; F1 is 0 where a class is never predicted.

    Arguments and errors: as `accuracy`.
    """
    return float(_sklearn("f1_score")(*_checked("macro_f1", labels, predictions), average="macro", zero_division=0))


def matthews(labels: Values, predictions: Values) -> float:
    """Matthews' correlation coefficient, in [-1, 1]; 0 where all labels or all predictions are one class.

    Arguments and errors: as `accuracy`.
    """
    true, found = _checked("matthews", labels, predictions)
    if len(np.unique(np.concatenate((true, found)))) == 1:  # of which scikit-learn warns
        return 0.0
    return float(_sklearn("matthews_corrcoef")(true, found))


def pearson(scores: Values, predictions: Values) -> float:
    """Pearson's correlation of scores, in [-1, 1]; nan, with scipy's warning, where one side is constant.

    Args:
        scores: (N,) true scores, N >= 2.
        predictions: (N,) predicted scores.
    Raises:
        ValueError: two lengths, or fewer than two scores.  ImportError: scipy is not installed.
    """
    return _correlation("pearson", "pearsonr", scores, predictions)


def spearman(scores: Values, predictions: Values) -> float:
    """Spearman's correlation, that of the ranks of scores.

    Arguments and errors: as `pearson`.
    """
    return _correlation("spearman", "spearmanr", scores, predictions)


def _correlation(name: str, function: str, scores: Values, predictions: Values) -> float:
    a, b = (values.astype(np.float64) for values in _checked(name, scores, predictions))
    if len(a) < 2:
        raise ValueError(f"{name}: {len(a)} score is given; a correlation needs at least two")
    return float(getattr(_package("scipy.stats", "scipy"), function)(a, b).statistic)


def _checked(name: str, true: Values, predicted: Values) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays of one length."""
    a, b = _array(true), _array(predicted)
    if a.ndim != 1 or b.ndim != 1 or len(a) != len(b):
        raise ValueError(
            f"{name}: shapes {a.shape} and {b.shape} were given; expected one prediction for each label, (N,)"
        )
    if not len(a):
        raise ValueError(f"{name}: there are no labels; give at least one example")
    return a, b


def _array(values: Any) -> np.ndarray:
    if not hasattr(values, "detach"):  # importing torch takes seconds, and numbers need none of it
        return np.asarray(values)
    held = values.detach().cpu()
    return (held.double() if held.is_floating_point() else held).numpy()  # numpy has no bfloat16


def _sklearn(name: str) -> Callable[..., float]:
    return getattr(_package("sklearn.metrics", "scikit-learn"), name)


def _package(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"this metric needs {name}: pip install 'gptfast-kernels[finetune]' (or {name})") from error
