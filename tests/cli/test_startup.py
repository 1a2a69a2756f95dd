"""What happens before torch is imported: the help and the version are quick, and OpenMP's spinning is bounded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import gptfast
from gptfast import openmp

MAIN = "import sys; sys.argv = ['gptfast', *{arguments}]\nfrom gptfast.__main__ import main\n"


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    return subprocess.run(
        [sys.executable, "-c", code], env={**env, **environment}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "arguments", [["--version"], ["--help"], ["train", "--help"], ["finetune", "--help"], ["generate", "--help"]]
)
def test_help_and_version_do_not_wait_for_torch(arguments):
    code = MAIN.format(arguments=arguments) + (
        "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'\n"
        "if sys.argv[1:] == ['--version']: assert 'typer' not in sys.modules, 'typer was imported'"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert (gptfast.__version__ if arguments == ["--version"] else "Usage") in done.stdout


def test_configurations_do_not_import_torch():
    """The command line reads their fields for --help, and a file of options could be checked as quickly."""
    modules = ("config", "training.config", "training.options", "generation.config", "data.options")
    imports = "\n".join(f"import gptfast.{module}" for module in modules)
    done = run(imports + "\nimport sys; assert not {'torch', 'numpy', 'rich', 'typer'} & set(sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_command_line_bounds_the_spinning_of_openmp():
    show = "import os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    code = MAIN.format(arguments=["info", "--help"]) + f"try: main()\nexcept SystemExit: {show}"
    assert run(code).stdout.endswith(f"{openmp.SPINS} False\n")
    assert run(code, GOMP_SPINCOUNT="7").stdout.endswith("7 False\n"), "what the user has set stays"
    assert run(code, OMP_WAIT_POLICY="passive").stdout.endswith("None False\n")


def test_bound_spinning_returns_whether_it_took_effect(monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # restored afterwards
    monkeypatch.delenv("GOMP_SPINCOUNT")
    assert not openmp.bound_spinning(5), "torch is loaded in this process"
    assert os.environ["GOMP_SPINCOUNT"] == "5"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.delitem(sys.modules, "torch")
    assert openmp.bound_spinning()
    assert not openmp.bound_spinning(3), "it has been chosen"
    with pytest.raises(ValueError, match="bound_spinning: spins is -1; expected 0 or more"):
        openmp.bound_spinning(-1)


def test_names_of_the_package():
    """Public names and modules are there after `import gptfast` alone, and `gptfast.backend` is module and function."""
    code = (
        "import gptfast, inspect\n"
        "assert set(gptfast.__all__) <= set(dir(gptfast))\n"
        "with gptfast.backend('eager'): pass\n"
        "from gptfast import GPT, backend\n"
        "assert gptfast.generation.Scheduler and gptfast.models.GPT is GPT and backend is gptfast.backend\n"
        "import gptfast.backend\n"
        "with gptfast.backend('eager'): pass\n"
        "for name in gptfast.__all__: getattr(gptfast, name)\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'gptfast' has no attribute 'gpt'"):
        gptfast.gpt  # noqa: B018
