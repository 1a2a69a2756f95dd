"""A worker that runs GPT-2 in ONNX Runtime, in an environment with onnxruntime, onnx and safetensors.

    ort_worker.py WEIGHTS FOLDER THREADS

WEIGHTS: float32, or int8 (MatMulNBits, blocks of 32, activations quantised too). The graph is made of the fused operators
that ONNX Runtime GenAI's models use: GroupQueryAttention with keys and values that stay in one buffer, SkipLayerNormalization,
FastGelu; the head multiplies the last position only. Inputs and outputs are bound, so nothing is copied from step to step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from stepping import Stepping
from worker import serve

CONTEXT = 1024
BLOCK = 32  # weights that share a scale


class Graph:
    """Nodes and weights of GPT-2, collected in order."""

    def __init__(self, folder: Path, packed: bool) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.L, self.H, self.C = config["n_layer"], config["n_head"], config["n_embd"]
        self.eps = config["layer_norm_epsilon"]
        weights = {}
        for path in sorted(folder.glob("*.safetensors")):
            weights |= {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
        self.weights, self.packed = weights, packed
        self.nodes: list[Any] = []
        self.values: list[Any] = []

    def add(self, op: str, inputs: list[str], outputs: list[str], **options: Any) -> str:
        domain = {"domain": "com.microsoft"} if op in FUSED else {}
        self.nodes.append(helper.make_node(op, inputs, outputs, name=outputs[0], **domain, **options))
        return outputs[0]

    def value(self, name: str, array: np.ndarray) -> str:
        self.values.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, name: str) -> str:
        return self.value(name, self.weights[name])

    def matmul(self, x: str, name: str, weight: np.ndarray, bias: str = "") -> str:
        """x times (in, out)."""
        K, N = weight.shape
        out = f"{name}.out"
        if not self.packed:
            y = self.add("MatMul", [x, self.value(name, weight)], [f"{name}.product" if bias else out])
            return self.add("Add", [y, bias], [out]) if bias else y
        groups = weight.T.reshape(N, K // BLOCK, BLOCK)
        scales = np.abs(groups).max(-1, keepdims=True) / 127
        codes = np.rint(groups / np.where(scales == 0, 1, scales)) + 128
        inputs = [
            x,
            self.value(name, codes.astype(np.uint8)),
            self.value(f"{name}.scales", scales.astype(np.float32).ravel()),
        ]
        inputs += ["", "", bias] if bias else []
        return self.add("MatMulNBits", inputs, [out], K=K, N=N, bits=8, block_size=BLOCK, accuracy_level=4)

    def norm(self, x: str, name: str, skip: str = "", bias: str = "") -> tuple[str, str]:
        """LayerNorm of x, or of x + skip + bias; and that sum."""
        gamma, beta = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        if not skip:
            return self.add("LayerNormalization", [x, gamma, beta], [f"{name}.out"], epsilon=self.eps), x
        outputs = [f"{name}.out", "", "", f"{name}.sum"]
        return self.add("SkipLayerNormalization", [x, skip, gamma, beta, bias], outputs, epsilon=self.eps), outputs[3]

    def layer(self, i: int, x: str, y: str) -> tuple[str, str]:
        """The sum so far and the output of its LayerNorm; afterwards the sum and what is added to it."""
        h = f"h.{i}"
        qkv = self.matmul(
            y, f"{h}.attn.c_attn.weight", self.weights[f"{h}.attn.c_attn.weight"], self.weight(f"{h}.attn.c_attn.bias")
        )
        cache = [f"past.{i}.key", f"past.{i}.value"]
        outputs = [f"{h}.attended", f"present.{i}.key", f"present.{i}.value"]
        inputs = [qkv, "", "", *cache, "seqlens_k", "total"]
        y = self.add("GroupQueryAttention", inputs, outputs, num_heads=self.H, kv_num_heads=self.H)
        y = self.matmul(y, f"{h}.attn.c_proj.weight", self.weights[f"{h}.attn.c_proj.weight"])
        y, x = self.norm(x, f"{h}.ln_2", y, self.weight(f"{h}.attn.c_proj.bias"))
        y = self.matmul(y, f"{h}.mlp.c_fc.weight", self.weights[f"{h}.mlp.c_fc.weight"])
        y = self.add("FastGelu", [y, self.weight(f"{h}.mlp.c_fc.bias")], [f"{h}.gelu"])
        return x, self.matmul(y, f"{h}.mlp.c_proj.weight", self.weights[f"{h}.mlp.c_proj.weight"])

    def build(self) -> bytes:
        tokens = self.add("Gather", [self.weight("wte.weight"), "ids"], ["tokens"])
        positions = self.add("Gather", [self.weight("wpe.weight"), "positions"], ["placed"])
        x = self.add("Add", [tokens, positions], ["embedded"])
        y, x = self.norm(x, "h.0.ln_1")
        for i in range(self.L):
            x, y = self.layer(i, x, y)
            if i + 1 < self.L:
                y, x = self.norm(x, f"h.{i + 1}.ln_1", y, self.weight(f"h.{i}.mlp.c_proj.bias"))
        last = self.value("last", np.array([-1], dtype=np.int64))
        x, y = (self.add("Gather", [z, last], [f"{z}.last"], axis=1) for z in (x, y))
        y, _ = self.norm(x, "ln_f", y, self.weight(f"h.{self.L - 1}.mlp.c_proj.bias"))
        logits = self.matmul(y, "head", self.weights["wte.weight"].T)
        return self.model(logits).SerializeToString()

    def model(self, logits: str) -> Any:
        def info(name: str, kind: int, shape: list[Any]) -> Any:
            return helper.make_tensor_value_info(name, kind, shape)

        cache, D = TensorProto.FLOAT, self.C // self.H
        names = [f"{i}.{part}" for i in range(self.L) for part in ("key", "value")]
        inputs = [info("ids", TensorProto.INT64, ["B", "T"]), info("positions", TensorProto.INT64, ["B", "T"])]
        inputs += [info("seqlens_k", TensorProto.INT32, ["B"]), info("total", TensorProto.INT32, [])]
        inputs += [info(f"past.{n}", cache, ["B", self.H, "S", D]) for n in names]
        outputs = [info(logits, TensorProto.FLOAT, ["B", 1, "V"])]
        outputs += [info(f"present.{n}", cache, ["B", self.H, "S", D]) for n in names]
        graph = helper.make_graph(self.nodes, "gpt2", inputs, outputs, self.values)
        versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=9)


FUSED = ("MatMulNBits", "GroupQueryAttention", "SkipLayerNormalization", "FastGelu")


class ONNXRuntime(Stepping):
    def __init__(self, weights: str, folder: str, threads: str) -> None:
        graph = Graph(Path(folder), weights == "int8")
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = int(threads), 1
        self.session = ort.InferenceSession(graph.build(), options, providers=["CPUExecutionProvider"])
        self.graph = graph
        graph.weights, graph.values = {}, []
        self.caches: dict[int, dict[str, Any]] = {}
        self.about = {"version": ort.__version__}

    def _cache(self, rows: int) -> dict[str, Any]:
        """Buffers for so many sequences; made once. What is behind the length is never read."""
        if rows not in self.caches:
            room = CONTEXT if rows == 1 else 128
            shape = (rows, self.graph.H, room, self.graph.C // self.graph.H)
            names = [f"{i}.{part}" for i in range(self.graph.L) for part in ("key", "value")]
            self.caches[rows] = {n: ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=np.float32)) for n in names}
        return self.caches[rows]

    def _step(self, ids: np.ndarray, position: int) -> np.ndarray:
        B, T = ids.shape
        binding = self.session.io_binding()
        feed = {
            "ids": ids.astype(np.int64),
            "positions": np.tile(np.arange(position, position + T, dtype=np.int64), (B, 1)),
            "seqlens_k": np.full(B, position + T - 1, dtype=np.int32),
            "total": np.array(position + T, dtype=np.int32),
        }
        for name, array in feed.items():
            binding.bind_cpu_input(name, array)
        for name, buffer in self._cache(B).items():
            binding.bind_ortvalue_input(f"past.{name}", buffer)
            binding.bind_ortvalue_output(f"present.{name}", buffer)
        binding.bind_output("head.out")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()[:, 0]


if __name__ == "__main__":
    serve(lambda: ONNXRuntime(*sys.argv[1:]))
