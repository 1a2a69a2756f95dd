"""Fixtures of tests of CUDA without a GPU."""

from tests.support.cuda_models import on_fake_gpu  # noqa: F401
