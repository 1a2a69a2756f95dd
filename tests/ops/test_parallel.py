"""Several Python threads at once, forked workers, and torch.set_num_threads."""

from __future__ import annotations

import ast
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gptfast import ops
from tests.support import ROOT

WORK = {
    "attention": lambda x: ops.causal_attention(x, x, x, dropout_p=0.1, seed=3),
    "gelu": ops.gelu,
    "layer_norm": lambda x: ops.layer_norm(x, torch.ones(x.shape[-1])),
    "linear": lambda x: ops.linear(x, torch.ones(48, x.shape[-1])),
    "sample": lambda x: ops.sample(x[0, 0], top_p=0.9, seed=5),
}


def computed(name: str) -> torch.Tensor:
    return WORK[name](torch.randn(2, 3, 150, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", WORK)
def test_several_python_threads(name):
    """Kernels keep their scratch memory per thread: calls from four threads at once do not meet in it."""
    expected = computed(name)
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(computed, [name] * 40):
            assert torch.equal(result, expected)


def test_different_ops_in_several_python_threads():
    expected = {name: computed(name) for name in WORK}
    with ThreadPoolExecutor(5) as pool:
        names = list(WORK) * 8
        for name, result in zip(names, pool.map(computed, names), strict=True):
            assert torch.equal(result, expected[name]), name


class Computed(torch.utils.data.Dataset):
    """Ops inside a DataLoader's worker, which is forked after the parent has used its thread pool."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return computed(list(WORK)[index % 3])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_forked_dataloader_workers():
    expected = [computed(name) for name in list(WORK)[:3]]
    ops.gelu(torch.randn(1 << 20))  # the pool runs
    loader = torch.utils.data.DataLoader(
        Computed(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    for index, result in enumerate(loader):
        assert torch.equal(result, expected[index % 3])


@pytest.mark.parametrize("name", WORK)
def test_any_number_of_threads(name, threads):
    torch.set_num_threads(1)
    expected = computed(name)
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        assert torch.get_num_threads() == count
        assert torch.equal(computed(name), expected)


def test_kernels_run_on_torchs_own_openmp():
    """One OpenMP runtime in the process: two would spin against each other."""
    # in a process of its own: scikit-learn, which another test may have imported here, brings a second one
    script = (
        "import torch; from gptfast import ops; ops.gelu(torch.ones(4, 1 << 20));"
        "print({x.split()[-1] for x in open('/proc/self/maps') if 'libgomp' in x or 'libiomp' in x or 'libomp' in x})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert len(ast.literal_eval(done.stdout)) <= 1, done.stdout
