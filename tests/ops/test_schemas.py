"""One table of schemas: what every namespace defines is what it says, and what implements other operators is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gptfast.triton
from gptfast import _schemas
from gptfast.backend import has_cpu_ops
from gptfast.ops import _registry
from tests.support import emulated

compiled = pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
KERNELS = [schema for schemas in _schemas.KERNELS.values() for schema in schemas]


def defined(namespace: str) -> dict[str, str]:
    """Name and schema of everything in torch.ops.<namespace>."""
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith(f"{namespace}::")]
    return {n.split("::")[1]: str(torch._C._jit_get_schemas_for_operator(n)[0]).split("::", 1)[1] for n in names}


def expected(schemas: list[str]) -> dict[str, str]:
    return {_schemas.name_of(s): str(torch._C.parse_schema(s)) for s in schemas}


@compiled
def test_the_compiled_namespace_is_the_table():
    schemas = [*_schemas.compiled("cpu"), *_schemas.CPU_LIBRARY, *_schemas.PYTHON]
    cuda = (*_schemas.CUDA_KERNELS, *_schemas.CUDA_LIBRARY)
    loaded = torch.ops.gptfast.__dict__.get("cuda_unavailable_reason")
    assert defined("gptfast") == expected([*schemas, *(cuda if loaded else ())])


def test_the_triton_namespace_is_the_table():
    assert defined("gptfast_triton") == expected(KERNELS)  # every kernel has a Triton twin


@compiled
def test_the_emulated_namespace_is_the_table():
    emulated.load()
    assert defined("gptfast_emu") == expected([*_schemas.compiled("cuda"), *_schemas.CUDA_KERNELS])


def test_a_triton_module_has_the_functions_of_its_schemas():
    pytest.importorskip("triton")
    for schema, module in gptfast.triton.implemented().items():
        assert callable(getattr(importlib.import_module(f"gptfast.triton.{module}"), _schemas.name_of(schema)))


def test_every_schema_has_a_fake():
    """Of kernels and Python operators: results without memory, for torch.compile, torch.export and meta tensors."""
    assert {_schemas.name_of(s) for s in (*KERNELS, *_schemas.CUDA_KERNELS)} <= set(_registry._fakes)
    for name in map(_schemas.name_of, _schemas.PYTHON):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"gptfast::{name}", "Meta"), name


def test_every_fake_has_a_schema():
    schemas = (*KERNELS, *_schemas.CUDA_KERNELS, *_schemas.CPU_LIBRARY)
    assert set(_registry._fakes) <= set(map(_schemas.name_of, schemas))


# ---- what does not belong together --------------------------------------------------------------------------------


@pytest.fixture
def toy():
    """A namespace of its own, gone after the test."""
    library = torch.library.Library("gptfast_toy", "FRAGMENT")
    yield library
    library._destroy()


def test_a_schema_without_a_kernel_is_an_import_error(toy):
    schemas = ("there(Tensor x) -> Tensor", "gone(Tensor x) -> Tensor")
    for schema in schemas:
        toy.define(schema)
    toy.impl("there", torch.clone, "CPU")
    _schemas.check_library("gptfast_toy", "cpu", schemas[:1], "toy.so")
    with pytest.raises(ImportError, match=r"toy.so: no kernel of gptfast_toy::gone for cpu tensors. The .* rebuild"):
        _schemas.check_library("gptfast_toy", "cpu", schemas, "toy.so")


def test_a_kernel_without_a_schema_is_an_import_error(toy):
    toy.m.impl("stray", "CPU", torch.clone)
    with pytest.raises(
        ImportError, match=r"toy.so: gptfast/_schemas.py has no schema of gptfast_toy::stray. .* rebuild"
    ):
        _schemas.check_library("gptfast_toy", "cpu", (), "toy.so")


def test_a_library_with_schemas_of_its_own_is_an_import_error(toy):
    """As one built before the schemas were in Python."""
    toy.define("there(Tensor x) -> Tensor")
    with pytest.raises(ImportError, match=r"torch.ops.gptfast_toy.there cannot be defined: (.|\n)*rebuild"):
        _schemas.define("gptfast_toy", ["there(Tensor x) -> Tensor"])


def test_a_triton_module_without_a_schema_is_an_import_error(monkeypatch, tmp_path: Path):
    (tmp_path / "softplus.py").touch()
    monkeypatch.setattr(gptfast.triton, "__path__", [*gptfast.triton.__path__, str(tmp_path)])
    with pytest.raises(ImportError, match=r"triton/softplus.py: gptfast/_schemas.py has no schema of softplus"):
        gptfast.triton.implemented()


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('_schemas.CPU_LIBRARY += ("nobody(Tensor x) -> Tensor",)', "no kernel of gptfast::nobody for cpu tensors"),
        ('del _schemas.KERNELS["gelu"]', "has no schema of gptfast::gelu_"),
    ],
)
def test_importing_gptfast_compares_library_and_table(change: str, message: str):
    code = f"from gptfast import _schemas\n{change}\nimport gptfast.ops"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and message in last and "_ops.so" in last and "rebuild" in last, (
        result.stderr
    )


def test_attention_options_are_those_of_the_schemas():
    """Field by field, as they are passed by position."""
    fields = list(_schemas.AttentionOptions._fields)
    for schema in _schemas.KERNELS["causal_attention"]:
        names = [a.name for a in torch._C.parse_schema(schema).arguments]
        assert names[-len(fields) :] == fields
