"""Who `bench_generate.py` compares with: each runs the same GPT-2 weights behind the same methods."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from gptfast import GPT

THREADS = torch.get_num_threads()
PROMPT = 16  # tokens before the decoding that is timed
CONTEXT = 1024
LLAMA_FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_K_M": 15}


class Runner(Protocol):
    """One implementation with one format of weights."""

    def decode(self, batch: int, tokens: int) -> float:
        """Seconds for `tokens` greedy steps of `batch` sequences, after their prompts."""
        ...

    def prefill(self, ids: list[int]) -> float:
        """Seconds until the logits behind a prompt are there."""
        ...

    def beams(self, count: int, tokens: int) -> float:
        """Seconds for so many tokens by a search over `count` beams. llama.cpp has none."""
        ...


def prompt(n: int, length: int = PROMPT) -> list[int]:
    return [(37 * i + 1009 * n) % 50257 for i in range(length)]


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


class Ours:
    def __init__(self, model: GPT, dtype: str) -> None:
        self.compiled = model.compile_for_inference(dtype)

    def decode(self, batch: int, tokens: int) -> float:
        prompts = [prompt(n) for n in range(batch)]

        def generate(n: int) -> float:
            return seconds(lambda: self.compiled.generate(prompts, max_new_tokens=n, temperature=0.0))

        return generate(1 + tokens) - generate(1)

    def prefill(self, ids: list[int]) -> float:
        return seconds(lambda: self.compiled.generate([ids], max_new_tokens=1, temperature=0.0))

    def beams(self, count: int, tokens: int) -> float:
        return seconds(lambda: self.compiled.generate([prompt(0)], max_new_tokens=tokens, num_beams=count))

    def read_seconds(self) -> float:
        """What reading the weights once takes, by a loop that does nothing else on the same threads."""
        return self.compiled.nbytes / self.compiled._core.read_rate(4)


class Transformers:
    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        self.model = GPT2LMHeadModel(GPT2Config(attn_implementation="sdpa")).eval()
        weights = {f"transformer.{k}": v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
        conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored transposed
        weights = {k: v.t() if k.endswith(conv1d) else v for k, v in weights.items()}
        self.model.load_state_dict(weights, strict=False)
        self.model.to(dtype)

    def decode(self, batch: int, tokens: int) -> float:
        ids = torch.tensor([prompt(n) for n in range(batch)])

        def generate(n: int) -> float:
            options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
            return seconds(lambda: self.model.generate(ids, **options))

        return generate(1 + tokens) - generate(1)

    def beams(self, count: int, tokens: int) -> float:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return seconds(lambda: self.model.generate(torch.tensor([prompt(0)]), num_beams=count, **options))

    @torch.inference_mode()
    def prefill(self, ids: list[int]) -> float:
        return seconds(lambda: self.model(torch.tensor([ids]), logits_to_keep=1))


class LlamaCpp:
    """llama.cpp, through the bindings of llama-cpp-python; the greedy choice itself is left out of its time."""

    def __init__(self, model: GPT, name: str, folder: Path) -> None:
        import llama_cpp

        self.lib = llama_cpp
        self.silence = llama_cpp.llama_log_callback(lambda *_: None)  # kept: the library calls it as long as it runs
        llama_cpp.llama_log_set(self.silence, None)
        path = self._file(model, name, folder)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.contexts: dict[int, Any] = {}

    def _file(self, model: GPT, name: str, folder: Path) -> Path:
        source, path = folder / "f32.gguf", folder / f"{name}.gguf"
        if not source.exists():
            write_gguf(model, source)
        if not path.exists():
            options = self.lib.llama_model_quantize_default_params()
            options.ftype, options.nthread = LLAMA_FILE_TYPES[name], THREADS
            self.lib.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(options))
        return path

    def _context(self, rows: int) -> Any:
        """Room for so many sequences; made once."""
        if rows not in self.contexts:
            self.contexts[rows] = self._new_context(rows)
        return self.contexts[rows]

    def _new_context(self, rows: int) -> Any:
        options = self.lib.llama_context_default_params()
        options.n_ctx = CONTEXT if rows == 1 else rows * 128
        options.n_batch = options.n_ubatch = 512
        options.n_seq_max = rows
        options.n_threads = options.n_threads_batch = THREADS
        return self.lib.llama_init_from_model(self.model, options)

    def _run(self, rows: int, tokens: list[list[int]], position: int, every: bool = False) -> None:
        """tokens[n] of sequence n, from this position on; logits of the last of each, or of every token."""
        total = sum(map(len, tokens))
        batch = self.lib.llama_batch_init(total, 0, 1)
        batch.n_tokens = total
        i = 0
        for n, row in enumerate(tokens):
            for k, token in enumerate(row):
                batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + k, 1, n
                batch.logits[i] = every or k == len(row) - 1
                i += 1
        if self.lib.llama_decode(self._context(rows), batch):
            raise RuntimeError("llama_decode failed")
        self.lib.llama_batch_free(batch)

    def _clear(self, rows: int) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self._context(rows)), True)

    def decode(self, batch: int, tokens: int) -> float:
        self._clear(batch)
        self._run(batch, [prompt(n) for n in range(batch)], 0)

        def steps() -> None:
            for i in range(tokens):
                self._run(batch, [[(7 * i + n) % 50257] for n in range(batch)], PROMPT + i)

        return seconds(steps)

    def prefill(self, ids: list[int]) -> float:
        self._clear(1)
        return seconds(lambda: self._run(1, [ids], 0))

    def logits(self, ids: list[int], V: int) -> torch.Tensor:
        """(T, V)"""
        self._clear(1)
        self._run(1, [ids], 0, every=True)
        values = self.lib.llama_get_logits(self._context(1))
        return torch.tensor([values[i * V : (i + 1) * V] for i in range(len(ids))])


class CTranslate2:
    def __init__(self, model: GPT, compute_type: str, folder: Path) -> None:
        import ctranslate2

        if not (folder / "model.bin").exists():
            write_ctranslate2(model, folder)
        self.generator = ctranslate2.Generator(
            str(folder), device="cpu", compute_type=compute_type, intra_threads=THREADS, inter_threads=1
        )

    def _generate(self, prompts: list[list[int]], n: int, beams: int = 1) -> float:
        texts = [[f"t{i}" for i in ids] for ids in prompts]
        options = {"max_length": n, "min_length": n, "include_prompt_in_result": False, "sampling_topk": 1}
        options["beam_size"] = beams
        return seconds(lambda: self.generator.generate_batch(texts, **options))

    def decode(self, batch: int, tokens: int) -> float:
        prompts = [prompt(n) for n in range(batch)]
        return self._generate(prompts, 1 + tokens) - self._generate(prompts, 1)

    def prefill(self, ids: list[int]) -> float:
        return self._generate([ids], 1)

    def beams(self, count: int, tokens: int) -> float:
        return self._generate([prompt(0)], tokens, count)


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
