"""Run docs/decoding.ipynb, which trains a small model in under a minute, and so write the pictures of docs/generation.md.

python scripts/decoding_pictures.py [--folder FOLDER] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import re
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs/decoding.ipynb"


def run_notebook(folder: Path, steps: int | None = None) -> dict[str, Any]:
    """Run the cells of the notebook one after another in a folder; returns their variables.

    Args:
        folder: gets pictures/ and runs/.
        steps: of the training instead of the notebook's; None: its own.
    """
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    os.chdir(folder)
    for n, cell in enumerate(cells):
        code = "".join(cell["source"])
        if cell["cell_type"] == "code":
            if steps is not None:
                code = re.sub(r"^STEPS = \d+", f"STEPS = {steps}", code, flags=re.M)
            exec(compile(code, f"decoding.ipynb, cell {n}", "exec"), names)
    return names


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=NOTEBOOK.parent, help="where pictures/ and runs/ are made")
    parser.add_argument("--steps", type=int, help="of the training, instead of the notebook's")
    arguments = parser.parse_args()
    run_notebook(arguments.folder, arguments.steps)
