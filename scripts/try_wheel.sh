#!/usr/bin/env bash
# Installs dist/*.whl into an empty environment, without a compiler on the path, and runs it.
#     scripts/try_wheel.sh [PYTHON] [REQUIREMENT …]      such as: scripts/try_wheel.sh python3.12 torch==2.11.0
set -euo pipefail
wheel=$(echo "$(dirname "$(realpath "$0")")"/../dist/*.whl)
python=${1:-python3}; shift || true
requirement=${*:-torch}

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
"$python" -m venv "$empty/venv"
"$empty/venv/bin/pip" install --quiet $requirement
"$empty/venv/bin/pip" install --quiet --only-binary :all: "$wheel"
cd "$empty"
alone=(/usr/bin/env PATH="$empty/venv/bin")  # the trap above needs the path as it is
"${alone[@]}" python - <<'PY'
import platform
import shutil

import torch

import gptfast
from gptfast import GPT, GPTConfig, ops
from gptfast.backend import cpu_isa, cpu_isas

assert shutil.which("g++") is None and shutil.which("cc") is None
assert cpu_isa() == cpu_isas()[-1], (cpu_isa(), cpu_isas())
q = torch.randn(1, 2, 8, 16)
expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(ops.causal_attention(q, q, q, backend="cpu"), expected)
try:  # the library's own C++ runtime must not send its exception through torch's frames
    torch.ops.gptfast.cross_entropy_fwd(torch.randn(2, 4), torch.tensor([0, 4]), -100, 0.0)
except RuntimeError as error:
    assert "targets[1] is 4" in str(error), error
else:
    raise AssertionError("a target beyond the classes was taken")
model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50)).eval()
tokens = model.compile_for_inference("fp32").generate([[1, 2, 3]], max_new_tokens=4, temperature=0.0)
assert tokens == model.generate([[1, 2, 3]], max_new_tokens=4, temperature=0.0), tokens
print("wheel: Python", platform.python_version(), "torch", torch.__version__, "ops and engine on", cpu_isa())
PY
"${alone[@]}" gptfast doctor
