"""Who `bench_generate.py` compares with: programs that run the same GPT-2 weights, each with its model in memory."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from generate_rounds import process_seconds

from gptfast import GPT, GPTConfig

HERE = Path(__file__).parent / "peers"
LLAMA_FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_K_M": 15}
IK_FILE_TYPES = {**LLAMA_FILE_TYPES, "q8_0_r8": 207, "iq4_ks": 145}
REPLY = 600  # seconds until an answer must be there


class Process:
    """A program that answers a line of JSON to each line (see peers/worker.py)."""

    def __init__(self, name: str, command: list[str], threads: int) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (it lives as long as the process)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        if command[0] != sys.executable:
            environment.pop("PYTHONPATH", None)  # an environment of its own
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment
        )
        self.about = self._answer()

    def ask(self, *words: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(" ".join(map(str, words)) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise RuntimeError(f"{self.name} has ended: {self._complaint()}") from None
        found = self._answer()
        if "error" in found:
            raise RuntimeError(f"{self.name}: {found['error']}")
        return found

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], REPLY)[0]:
            self.process.kill()
            raise RuntimeError(f"{self.name} has not answered for {REPLY} s")
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise RuntimeError(f"{self.name} has ended: {self._complaint()}")
        return json.loads(line)

    def _complaint(self) -> str:
        self.errors.seek(0)
        lines = [line.strip() for line in self.errors.read().splitlines() if line.strip()]
        return lines[-1] if lines else f"exit status {self.process.poll()}"

    def cpu_seconds(self) -> float:
        return process_seconds(Path(f"/proc/{self.process.pid}/stat").read_text())

    def peak_gb(self) -> float:
        """The most memory it has had."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.errors.close()


@dataclass(frozen=True)
class Programs:
    """Where the peers are; None: left out."""

    folder: Path  # weights and converted files are kept here
    threads: int
    llama: Path | None = None
    ik: Path | None = None
    openvino_python: Path | None = None
    ort_python: Path | None = None

    @property
    def model(self) -> Path:
        """The weights in Hugging Face's layout."""
        return self.folder / "gpt2"

    def write_model(self) -> None:
        """Random weights: they cost the same as others."""
        if (self.model / "config.json").exists():
            return
        import torch

        torch.manual_seed(0)
        GPT(GPTConfig.preset("gpt2", dropout=0.0)).save_pretrained(self.model)

    def command(self, name: str) -> list[str]:
        """Starts the worker of this name: a program and a format, and what else it is told.

        Raises:
            LookupError: this program is not here.
        """
        program, *words = name.split()
        threads = str(self.threads)
        if program in ("gptfast", "transformers"):
            return [sys.executable, str(HERE / "torch_worker.py"), program, words[0], str(self.model)]
        if program == "CTranslate2":
            folder = self.folder / "ctranslate2"
            if not (folder / "model.bin").exists():
                write_ctranslate2(GPT.from_pretrained(self.model), folder)
            return [sys.executable, str(HERE / "torch_worker.py"), "ctranslate2", words[0], str(folder), threads]
        if program == "OpenVINO":
            python = present(self.openvino_python, "--openvino-python")
            cache = str(self.folder / "openvino")
            return [str(python), str(HERE / "openvino_worker.py"), *words, str(self.model), threads, cache]
        if program == "ORT":
            python = present(self.ort_python, "--ort-python")
            return [str(python), str(HERE / "ort_worker.py"), *words, str(self.model), threads]
        return [str(self._llama(program)), str(self._gguf(program, words[0])), threads, *words[1:]]

    def _llama(self, program: str) -> Path:
        if program == "llama.cpp":
            return present(self.llama, "--llama-bin")
        return present(self.ik, "--ik-bin")

    def _gguf(self, program: str, kind: str) -> Path:
        """The file of this format; made once, by the program that reads it."""
        tool, source = self._llama(program), self.folder / "f32.gguf"
        path = self.folder / program / f"{kind}.gguf"
        if not source.exists():
            write_gguf(GPT.from_pretrained(self.model), source)
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            kinds = LLAMA_FILE_TYPES if program == "llama.cpp" else IK_FILE_TYPES
            words = [source, path, kinds[kind], self.threads]
            subprocess.run(list(map(str, [tool, "quantize", *words])), check=True, stdout=subprocess.DEVNULL)
        return path


def present(path: Path | None, option: str) -> Path:
    if path is None:
        raise LookupError(f"{option} is not given")
    if not path.exists():
        raise LookupError(f"{option} {path} does not exist")
    return path


def write_gguf(model: GPT, path: Path) -> None:
    """The weights as llama.cpp reads them, in fp32, with tokens that only have numbers."""
    import gguf

    c = model.config
    w = gguf.GGUFWriter(path, "gpt2")
    w.add_block_count(c.n_layer)
    w.add_context_length(c.block_size)
    w.add_embedding_length(c.n_embd)
    w.add_feed_forward_length(c.inner_dim)
    w.add_head_count(c.n_head)
    w.add_layer_norm_eps(c.layer_norm_epsilon)
    w.add_file_type(0)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list([f"t{i}" for i in range(c.vocab_size)])
    w.add_token_types([1] * c.vocab_size)
    w.add_token_merges(["t 1"])
    w.add_bos_token_id(c.vocab_size - 1)
    w.add_eos_token_id(c.vocab_size - 1)
    names = {"ln_1": "attn_norm", "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"}
    names |= {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
    top = {"wte.weight": "token_embd.weight", "wpe.weight": "position_embd.weight", "lm_head.weight": "output.weight"}
    top |= {"ln_f.weight": "output_norm.weight", "ln_f.bias": "output_norm.bias"}
    for name, value in model.named_parameters(remove_duplicate=False):
        if name in top:
            theirs = top[name]
        else:
            _, layer, *middle, kind = name.split(".")
            theirs = f"blk.{layer}.{names['.'.join(middle)]}.{kind}"
        w.add_tensor(theirs, value.detach().float().contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def write_ctranslate2(model: GPT, folder: Path) -> None:
    from ctranslate2.specs import common_spec, transformer_spec

    c, weights = model.config, {k: v.detach().numpy() for k, v in model.named_parameters()}
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        c.n_layer, c.n_head, pre_norm=True, activation=common_spec.Activation.GELUTanh
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = decoder.projection.weight = weights["wte.weight"]
    decoder.position_encodings.encodings = weights["wpe.weight"]

    def norm(to: Any, name: str) -> None:
        to.gamma, to.beta = weights[f"{name}.weight"], weights[f"{name}.bias"]

    def linear(to: Any, name: str) -> None:
        to.weight, to.bias = weights[f"{name}.weight"], weights[f"{name}.bias"]

    norm(decoder.layer_norm, "ln_f")
    for i, layer in enumerate(decoder.layer):
        norm(layer.self_attention.layer_norm, f"h.{i}.ln_1")
        linear(layer.self_attention.linear[0], f"h.{i}.attn.c_attn")
        linear(layer.self_attention.linear[1], f"h.{i}.attn.c_proj")
        norm(layer.ffn.layer_norm, f"h.{i}.ln_2")
        linear(layer.ffn.linear_0, f"h.{i}.mlp.c_fc")
        linear(layer.ffn.linear_1, f"h.{i}.mlp.c_proj")
    spec.register_vocabulary([f"t{i}" for i in range(c.vocab_size)])
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = f"t{c.vocab_size - 1}"
    folder.mkdir(parents=True, exist_ok=True)
    spec.validate()
    spec.save(str(folder))
