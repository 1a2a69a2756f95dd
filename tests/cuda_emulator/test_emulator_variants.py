"""The CUDA kernels on the emulator with the race checker and with AddressSanitizer, each in one process of its own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import emulated
from tests.support.chosen_tests import passed

ROWS = "emu and (test_parity or reference or aligned_width) and not 50257 and not N65C768 and not N6V2049"
SHAPES = "bf16 and (B2H2T129D128 or B2H2T113D59 or S700 or S560 or T300D128 or T130D128K1 or T5S530D64K1) or fp32 and B1H2T5S200"
OPS = (
    "gelu",
    "dropout",
    "layer_norm",
    "cross_entropy",
    "sample",
    "embedding",
    "rms_norm",
    "relu_squared",
    "swiglu",
    "rotary",
)
CHOSEN = {f"ops/test_{op}.py": ROWS for op in OPS}
CHOSEN["ops/test_causal_attention.py"] = f"test_parity and emu and ({SHAPES})"
CHOSEN["ops/test_linear_few.py"] = "bf16 and test_it_is and not (eight or many)"
CHOSEN["cuda_emulator/test_emulator_attention.py"] = (
    f"(test_long_rows or test_few_queries) and ({SHAPES})"
    " or test_nan_in_masked and hopper and bf16"  # what threads clean, wgmma reads
)


def asan() -> dict[str, str]:
    """torch's libraries were not built for it: leaks and mixed allocators of theirs are not the question here."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    options = "detect_leaks=0:alloc_dealloc_mismatch=0:halt_on_error=1"
    return {"LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": options}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["race", "asan"])
def test_without_races_and_without_a_byte_too_far(variant: str, tmp_path: Path):
    emulated.build(variant)
    environment = {"GPTFAST_EMU_VARIANT": variant, **(asan() if variant == "asan" else {})}
    found = passed(CHOSEN, tmp_path, "-x", "-s", **environment)
    assert all(found.values()), found
