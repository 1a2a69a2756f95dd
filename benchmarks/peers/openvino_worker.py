"""A worker that runs GPT-2 in OpenVINO, in an environment with openvino, optimum-intel and nncf.

    openvino_worker.py WEIGHTS PRECISION FOLDER THREADS CACHE

WEIGHTS: float32, int8 (a scale a channel) or int4 (groups of 64, the head in int8). PRECISION: f32 or bf16, in which it
computes. The stateful model that optimum exports is asked directly, a call a step, with the head on the last position only,
as OpenVINO GenAI does it; its converted files are kept in CACHE. Keys and values are in OpenVINO's default, 8 bits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import opset13 as ops
from stepping import Stepping
from worker import serve


def converted(weights: str, folder: str, cache: Path) -> Path:
    """The file of the model in this format; made once."""
    path = cache / weights / "openvino_model.xml"
    if not path.exists():
        from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

        packed = {
            "float32": None,
            "int8": OVWeightQuantizationConfig(bits=8, sym=True),
            "int4": OVWeightQuantizationConfig(bits=4, sym=True, group_size=64, ratio=1.0),
        }[weights]
        options = {"quantization_config": packed} if packed else {"load_in_8bit": False}
        OVModelForCausalLM.from_pretrained(folder, export=True, compile=False, **options).save_pretrained(path.parent)
    return path


def with_last_position_only(model: ov.Model) -> ov.Model:
    """The head multiplies what is behind the last token of each row and nothing else."""
    product = model.output("logits").get_node().input_value(0).get_node()
    while product.get_type_name() != "MatMul":
        product = product.input_value(0).get_node()
    last = ops.slice(product.input_value(0), [-1], [np.iinfo(np.int64).max], [1], [1])
    product.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


class OpenVINO(Stepping):
    def __init__(self, weights: str, precision: str, folder: str, threads: str, cache: str) -> None:
        core = ov.Core()
        model = with_last_position_only(core.read_model(converted(weights, folder, Path(cache))))
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": int(threads),
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        }
        self.request = core.compile_model(model, "CPU", options).create_infer_request()
        self.inputs = {name for port in model.inputs for name in port.names}
        self.about = {"version": ov.__version__.split("-")[0]}

    def _begin(self) -> None:
        self.request.reset_state()

    def _step(self, ids: np.ndarray, position: int) -> np.ndarray:
        B, T = ids.shape
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones((B, position + T), dtype=np.int64),
            "position_ids": np.tile(np.arange(position, position + T, dtype=np.int64), (B, 1)),
            "beam_idx": np.arange(B, dtype=np.int32),
        }
        found = self.request.infer(
            {k: v for k, v in feed.items() if k in self.inputs}, share_inputs=True, share_outputs=True
        )
        return found[0][:, -1]


if __name__ == "__main__":
    serve(lambda: OpenVINO(*sys.argv[1:]))
