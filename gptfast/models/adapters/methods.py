"""The methods of a GPT that are about adapters."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from gptfast._checks import check_count
from gptfast._warn import warn
from gptfast.checkpoints.adapter_config import of_user
from gptfast.metadata import Metadata, end_tokens_in
from gptfast.models.adapters import attached, files, merging
from gptfast.models.vocabulary import set_rows
from gptfast.nn.transformer import Transformer


class AdapterMethods(Transformer):
    """Adapters: small trained parts beside a frozen base, with the names of peft and of transformers' models."""

    metadata: Metadata
    name_or_path: str | None = None  # of the checkpoint that holds this base, which adapters name; None: none is known
    revision: str | None = None  # of that checkpoint, where it is a model of the Hugging Face hub
    # Tokens whose rows are in no checkpoint of the base: adapters are saved with them.
    new_rows: frozenset[int] = frozenset()

    def add_adapter(self, config: Any, name: str = "default") -> None:
        """Add a new adapter, make it the active one, and freeze the base.

        Its parameters are called h.0.attn.c_attn.lora_A.<name>.weight and so on, of a soft prompt
        prompt_encoder.<name>.embedding.weight. They are float32 beside a base in half
        precision.

        Args:
            config: a `LoraConfig` or `PromptTuningConfig` of `gptfast.finetuning`, or peft's.
            name: of the adapter.
        Raises:
            TypeError, ValueError: bad values, module names that do not exist, a name that is taken, a soft prompt that leaves
                no room in block_size.  OSError: no tokenizer for the text of a soft prompt. The model stays as it was.
        """
        attached.add(self, of_user(config), name, files.base_mark(self) if self.adapters is None else "")

    def load_adapter(self, path: str | os.PathLike[str], name: str = "default", *, any_base: bool = False) -> None:
        """Add the adapter in a folder that `save_adapter` or peft wrote, and make it the active one.

        It is trained as one of `add_adapter` is, also where its configuration says inference_mode, as all files do; peft's
        default is_trainable=False is `set_requires_grad(name, False)` after it.

        Where the folder has a generation_config.json, as that of a chat has, its end tokens end texts too.

        Args:
            path: folder with adapter_config.json and adapter_model.safetensors.
            name: of the adapter.
            any_base: also where the adapter says that it was trained on a base with other weights.
        Raises:
            OSError, ValueError: missing or damaged files, or an adapter of another base. The model stays as it was.
        """
        ends = end_tokens_in(path)
        heads = files.load(self, path, name, any_base)
        if ends:
            self.metadata = self.metadata.with_adapter(name, ends)
        if heads:
            warn(
                f"load_adapter: {path} has the head of a task too, which gptfast.finetuning.TaskModel.from_pretrained reads"
            )

    def save_adapter(self, path: str | os.PathLike[str], name: str = "default") -> None:
        """Write an adapter to a folder in peft's format, without the base.

        Where its configuration names no base_model_name_or_path, the file has `name_or_path`, as in peft: where the base was
        loaded from (with its revision), or where `save_pretrained` wrote it last; null where there is no such checkpoint. Where the model has a
        generation_config.json, or the adapter end tokens of its own, the folder has them too.

        Raises:
            OSError: it cannot be written; what was there stays.  ValueError: no adapter of this name, or it is merged.
        """
        files.save(self, path, name)

    def set_adapter(self, names: str | Sequence[str]) -> None:
        """Make adapters the active ones: a forward adds up their updates, and they are trained, others not. One of them may be
        a soft prompt.

        Raises:
            ValueError: unknown name, or several soft prompts.
        """
        attached.activate(self, names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train these adapters too, or freeze them; `set_adapter` leaves only the active ones trained. For batches with
        `adapter_names`: their rows may be under several soft prompts, of which one at most is active.

        Raises:
            ValueError: unknown name, or adapters are merged.
        """
        attached.set_requires_grad(self, adapter_names, requires_grad)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; none while they are disabled."""
        state = self.adapters
        return list(state.active) if state is not None and state.enabled else []

    def enable_adapters(self) -> None:
        """Use the active adapters again."""
        attached.enable(self, True)

    def disable_adapters(self) -> None:
        """Compute as the base alone, whatever adapter_names say (as in peft), until `enable_adapters` or `set_adapter`."""
        attached.enable(self, False)

    def delete_adapter(self, names: str | Sequence[str]) -> None:
        """Remove adapters. Without the last one the model is what it was, its parameters trained as before.

        Raises:
            ValueError: unknown name, or adapters are merged.
        """
        attached.delete(self, names)
        for name in (names,) if isinstance(names, str) else names:
            self.metadata = self.metadata.with_adapter(name, ())

    def merge_adapter(self, names: str | Sequence[str] | None = None) -> None:
        """Make the weights those of the base with the updates of adapters: a plain GPT, which the engine runs and
        `save_pretrained` writes. A second call for the same adapters has no effect.

        The base's own matrices are kept for `unmerge_adapter`, which restores them bit for bit.

        Args:
            names: of the adapters; None: the active ones.
        Raises:
            ValueError: unknown name, a soft prompt, other adapters are merged, or an update is not finite.
        """
        merging.merge(self, names)

    def unmerge_adapter(self) -> None:
        """Undo `merge_adapter`."""
        merging.unmerge(self)

    def resize_token_embeddings(self, new_num_tokens: int) -> None:
        """Give the model a vocabulary of another size, as transformers does.

        Rows of new tokens are drawn around the mean of the others. Call it before `add_adapter`. `save_adapter` stores the
        embeddings beside an adapter that has no trained copy of them, as the new rows are in no checkpoint of the base; after
        `save_pretrained` they are.

        Args:
            new_num_tokens: V, the number of token ids, at least 1.
        Raises:
            TypeError, ValueError: no such number, or the model has adapters.
        """
        check_count("resize_token_embeddings", "new_num_tokens", new_num_tokens)
        if self.adapters is not None:
            raise ValueError("resize_token_embeddings: the model has adapters; resize it before add_adapter")
        V = self.config.vocab_size
        set_rows(self, new_num_tokens, min(V, new_num_tokens), new_num_tokens)
        self.new_rows = frozenset(n for n in {*self.new_rows, *range(V, new_num_tokens)} if n < new_num_tokens)
