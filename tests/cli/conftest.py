"""Fixtures of tests of the command line."""

from tests.support.browser import browser  # noqa: F401
from tests.support.command import run  # noqa: F401
from tests.support.train_command import _argv, _threads, text  # noqa: F401
