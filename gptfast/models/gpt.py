"""GPT: the network with generation and checkpoints."""

from __future__ import annotations

import os
from typing import Any

import torch

from gptfast._folders import destination
from gptfast._pages import drop_code
from gptfast.config import GPTConfig
from gptfast.engine import CompiledGPT, compile_model, engine_for
from gptfast.generation import CudaGraphRunner, Runner, TorchRunner, generate
from gptfast.metadata import Metadata, metadata_of
from gptfast.models import export, pretrained
from gptfast.models.adapters.files import base_mark
from gptfast.models.adapters.methods import AdapterMethods


class GPT(AdapterMethods):
    """A language model (GPT-1 to GPT-3, Llama, Qwen3, GPT-NeoX, nanochat, gpt-oss) whose parameters have GPT-2's names.

    A new one has random weights and is in training mode; `from_pretrained` loads one for evaluation. `forward` and training are
    those of `gptfast.nn.Transformer`. `metadata` is what the checkpoint says beside the config (end tokens, settings of
    generation), which `save_pretrained` writes back.

    Args:
        config: the shape, see `GPTConfig`.
    Raises:
        ValueError: a config with causal=False.
    """

    def __init__(self, config: GPTConfig) -> None:
        if isinstance(config, GPTConfig) and not config.causal:
            raise ValueError(
                "GPT: the config has causal=False, as a BERT has: it fills masks and continues no text; use gptfast.BERT"
            )
        super().__init__(config)
        self.metadata = Metadata()

    def generate(self, ids: Any = None, max_new_tokens: int | None = None, **options: Any) -> Any:
        """Continue prompts: greedily by default, drawn, or by beams, as `transformers.generate`.

        In evaluation mode on the CPU the native engine runs the generation, from a packed copy of the weights in their own
        dtype; on a GPU captured steps do. A model whose modules are not what its config says runs in torch. See `runner`.

        Args:
            ids: (B, T) tensor of token ids; or a list of id lists of any lengths, which are not padded; or a BatchEncoding.
            max_new_tokens: None: 64, or what room the block_size leaves, whichever is less.
            options: do_sample, temperature, top_k, top_p, min_p, seed (any of which draws), num_beams, eos_token_id, …: the
                fields of `gptfast.generation.GenerationConfig`; and attention_mask, adapter_names, tokenizer, assistant_model,
                streamer, return_logprobs and prefix_embeds, as in `gptfast.generation.generate`. eos_token_id is by default what the checkpoint's
                generation_config.json and config.json name together, and none for a model that was built here;
                eos_token_id=None ends at none. pad_token_id is what one of these files names. Other settings of
                generation_config.json are not taken here.
        Returns:
            Prompts and new tokens: a tensor (B * num_return_sequences, T + n) for a tensor, else a list of id lists.
        Raises:
            TypeError, ValueError: bad prompts or options.  RuntimeError: the logits hold nan.
        """
        ends = metadata_of(self).ends(self.config.vocab_size)
        return generate(self, ids, **{**ends, "max_new_tokens": max_new_tokens, **options})

    def runner(self, max_slots: int, max_len: int) -> Runner:
        """The fastest runner that can run the model as it is now; see `gptfast.generation.Runner`.

        On the CPU the native engine, where it can run the model (`gptfast.engine.engine_for`), with its adapters: each call
        compares its packed copy with all of the weights. On a GPU with the CUDA kernels captured steps, where these can be
        captured. Else torch.

        Args:
            max_slots: number of sequences at a time.
            max_len: number of positions of a sequence, at most block_size.
        """
        engine = engine_for(self)
        if engine is not None:
            return engine.runner(max_slots, max_len)
        if CudaGraphRunner.supports(self):
            return CudaGraphRunner(self, max_slots, max_len)
        return TorchRunner(self, max_slots, max_len)

    def compile_for_inference(
        self,
        dtype: str | torch.dtype = "bfloat16",
        *,
        threads: int | None = None,
        max_rows: int | None = None,
        cache_dtype: str | torch.dtype | None = None,
    ) -> CompiledGPT:
        """Pack the weights for the native CPU engine; the result has the same `generate`.

        Of a model that was loaded in 4 or 8 bits (`quantize`) it packs the numbers that the codes stand for.

        Args:
            dtype: of the matrices: "float32"; "bfloat16" (12 bits a weight: its exponents need no more than 4); "int8"
                (8.5), "int6" (6.5); in 4.5 bits "q4" (levels of least error, the head and the token embedding in int6),
                "int4" and "nf4" (both with these in int8); "mxfp4" (4.25, the MLPs alone, the rest in bfloat16: the numbers of
                gpt-oss' checkpoints as they are). The quantised formats multiply in bytes. What each costs in
                quality: docs/notes/engine.md.
            threads: number of threads, at least 1; None: as many as torch uses. The results do not depend on it.
            max_rows: the most sequences that may run at a time; None: as many as are asked for.
            cache_dtype: of keys and values, "float32", "float16" or "bfloat16"; None: "float32" beside fp32 weights, else
                "float16".
        Returns:
            A `gptfast.engine.CompiledGPT`; of a checkpoint its `from_pretrained` makes the same one in less memory. It holds
            weights of its own: this model may be changed or deleted. It has all adapters of the model that are not merged
            beside the packed base (low-rank factors in bfloat16 beside 8 bits and fewer, else in fp32), and the same ones are
            active.
        Raises:
            ValueError: an unknown dtype, weights that are not finite, or modules that are not what the config says: hooks,
                other classes, attributes or methods, or an adapter with modules_to_save.
            RuntimeError: gptfast has no compiled part.
        """
        compiled = compile_model(self, dtype, threads=threads, max_rows=max_rows, cache_dtype=cache_dtype)
        compiled.base_mark = base_mark(self)
        drop_code()
        return compiled

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        quantize: str | None = None,
        double_quant: bool = False,
        revision: str | None = None,
        **config_overrides: Any,
    ) -> GPT:
        """Load a checkpoint folder or a model of the Hugging Face hub, in evaluation mode.

        Args:
            path: a folder with config.json and safetensors (or an older pytorch_model.bin), written by `save_pretrained` or by
                transformers; nanoGPT's ckpt.pt, or its folder; or a hub id such as "openai-community/gpt2" (needs
                huggingface-hub). Pickles are read by torch.load with weights_only=True.
            dtype: of the weights; None: as stored.
            config_overrides: fields of `GPTConfig` to change, such as dropout=0.0; a smaller block_size cuts the position
                embedding. extend_context=N gives a context of N tokens, more than the checkpoint's; rope_scaling="yarn" (the
                default) or "linear" says how rotary positions are scaled for it.
            quantize: "nf4", "int4", "int8" or "mxfp4": the matrices of the blocks are held in that, frozen, each quantised as it is
                read; to train adapters around them (QLoRA). None: as floats.
            double_quant: with "nf4": quantise the scales too, 4.13 bits a weight instead of 4.5.
            revision: of a model of the hub: a branch, a tag or a commit, as in transformers; None: the newest. The hub id
                NAME@REVISION says the same, also on the command line.
        Returns:
            The model in evaluation mode; call .train() to train it.
        Raises:
            FileNotFoundError: no such folder, or a file is missing in it.
            ValueError: a damaged file, another architecture, tensors that are missing, too many or ill-shaped, a pickle that
                names other code than that of tensors, or a revision of what is on this machine.
            ImportError, OSError: a hub id without huggingface-hub, or without a connection.
        """
        return pretrained.load(cls, path, dtype, config_overrides, quantize, double_quant, revision)

    def save_pretrained(self, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write config.json and the weights to a folder that transformers reads with the same logits.

        Args:
            path: a folder, made if missing; its other files stay. A failure leaves what was there.
            max_shard_size: bytes, or text such as "500MB" (10**6 each); larger weights become several files with an index.
        Raises:
            OSError: it cannot be written (disk full, no permission).
            ValueError: a wrong max_shard_size; or the model's modules are not what its config says, or it has adapters that
                are not merged.
        """
        export.save(self, path, max_shard_size)
        if self.adapters is None:  # else a merged model was written, which is not the base of its adapters
            self.new_rows, self.name_or_path, self.revision = frozenset(), str(destination(path)), None
