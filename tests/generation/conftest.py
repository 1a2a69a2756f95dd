"""Fixtures of tests of generation."""

from tests.support.command import run  # noqa: F401
from tests.support.cuda_models import on_fake_gpu  # noqa: F401
