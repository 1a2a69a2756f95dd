"""The metrics of fine-tuning, against their definitions."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from gptfast.finetuning import metrics

TRUE, FOUND = ["a", "b", "a", "c", "c", "a"], ["a", "a", "a", "c", "b", "b"]
X, Y = [1.0, 2.0, 3.0, 5.0], [1.0, 4.0, 2.0, 9.0]
LABEL_METRICS = (metrics.accuracy, metrics.macro_f1, metrics.matthews)
SCORE_METRICS = (metrics.pearson, metrics.spearman)


def test_metrics_of_labels():
    assert metrics.accuracy(TRUE, FOUND) == 3 / 6
    f1 = [2 * 2 / (3 + 3), 0.0, 2 * 1 / (2 + 1)]  # of a, b, c: 2 hits / (true + predicted)
    assert metrics.macro_f1(TRUE, FOUND) == pytest.approx(np.mean(f1))
    # Gorodkin 2004: (hits * n - sum t_k p_k) / sqrt((n^2 - sum p_k^2) (n^2 - sum t_k^2))
    t, p = np.array([3, 1, 2]), np.array([3, 2, 1])
    wanted = (3 * 6 - t @ p) / np.sqrt((36 - p @ p) * (36 - t @ t))
    assert metrics.matthews(TRUE, FOUND) == pytest.approx(wanted)
    assert metrics.matthews([0, 0, 1], [0, 0, 0]) == 0  # one class


def test_metrics_of_scores():
    assert metrics.pearson(X, Y) == pytest.approx(np.corrcoef(X, Y)[0, 1])
    assert metrics.spearman(X, Y) == pytest.approx(np.corrcoef([0, 1, 2, 3], [0, 2, 1, 3])[0, 1])


def test_metrics_take_tensors_and_return_floats():
    for metric in (*LABEL_METRICS, *SCORE_METRICS):
        tensors = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 0], dtype=torch.int32)
        assert type(metric(*tensors)) is float
        assert metric(*tensors) == metric([0, 1, 1, 0], np.array([0, 1, 0, 0]))
        large = torch.tensor([2**53, 2**53 + 1, 2**53 + 3])  # which floats do not tell apart
        assert metric in SCORE_METRICS or metric(large, large.flip(0)) == metric([0, 1, 2], [2, 1, 0])
        assert metric(torch.ones(2).bfloat16().cumsum(0), [1, 2]) == pytest.approx(1)


@pytest.mark.parametrize("metric", [*LABEL_METRICS, *SCORE_METRICS])
def test_metrics_refuse(metric):
    name = metric.__name__
    with pytest.raises(ValueError, match=rf"{name}: shapes \(2,\) and \(3,\)"):
        metric([0, 1], [0, 1, 2])
    with pytest.raises(ValueError, match=f"{name}: there are no labels"):
        metric([], [])


def test_a_correlation_needs_two():
    with pytest.raises(ValueError, match="pearson: 1 score is given"):
        metrics.pearson([1.0], [2.0])


@pytest.mark.parametrize(
    ("metric", "module"), [(metrics.accuracy, "sklearn.metrics"), (metrics.pearson, "scipy.stats")]
)
def test_a_missing_package_names_the_extra(monkeypatch, metric, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"gptfast-kernels\[finetune\]"):
        metric([0.0, 1.0], [0.0, 1.0])
