"""Loading checkpoints: the Hugging Face layout (config.json, and safetensors or .bin), and nanoGPT's ckpt.pt."""

from __future__ import annotations

import os
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.weight_files import StoredTensor
from gptfast.config import GPTConfig
from gptfast.models import longer
from gptfast.models.locate import hub_name, resolve
from gptfast.models.quantized import Packing, check_format
from gptfast.models.stored import StoredModel
from gptfast.nn.meta import only_shapes
from gptfast.nn.position import SinusoidalEmbedding
from gptfast.nn.rotary import RotaryEmbedding
from gptfast.nn.transformer import Transformer

_HEADS = ("score.", "multiple_choice_head.", "classifier.")  # of tasks
Model = TypeVar("Model", bound=Transformer)
EQUAL_ROWS = 4096  # of two matrices that are compared, read at a time


class Taking(Protocol):
    """Takes tensors of a checkpoint for itself as they come."""

    def take(self, name: str, stored: StoredTensor, transposed: bool, dtype: torch.dtype | None) -> bool:
        """Take the tensor of this name of ours, if it wants it; whether it did.

        transposed: the file has the transpose of our matrix. dtype: in which it would be loaded; None: as stored.
        """
        ...


def load(
    cls: type[Model],
    path: str | os.PathLike[str],
    dtype: torch.dtype | None,
    overrides: dict[str, Any],
    quantize: str | None = None,
    double_quant: bool = False,
    revision: str | None = None,
) -> Model:
    """A model in evaluation mode, from a checkpoint folder or a Hugging Face hub id (call .train() to train
    it).

    Args:
        cls: GPT or a subclass.
        path: folder with config.json and safetensors of a gpt2, openai-gpt, llama, qwen3, gpt_neox, gpt_oss, nanochat or bert model,
            ours or transformers'; or a hub id such as "openai-community/gpt2" (needs huggingface-hub). The older pytorch_model.bin serves where there
            are no safetensors. Or nanoGPT's ckpt.pt, or the folder that holds it: its GELU is taken for the exact one, so
            say activation="gelu_tanh" for one that was trained before May 2023. Of pickles only tensors and plain data are
            read (torch.load with weights_only=True).
        dtype: of the weights; None: as stored.
        overrides: fields of GPTConfig to change, such as dropout=0.0; a smaller block_size cuts the position embedding;
            extend_context=N makes it longer, see `gptfast.models.longer`.
        quantize, double_quant: see `gptfast.models.quantized.Packing`; None: as floats.
        revision: of a model of the hub, see `gptfast.models.locate.resolve`.
    Raises:
        FileNotFoundError: no such folder, or a file is missing in it.
        ValueError: a damaged file, another architecture, tensors that are missing, too many or ill-shaped, or a
            pickle that names other code than that of tensors.
        ImportError, OSError: a hub id without huggingface-hub, or without a connection.
    """
    check_format(quantize, double_quant)
    model: Any = build(cls, StoredModel(resolve(path, revision)), dtype, overrides, quantize, double_quant)
    model.name_or_path, model.revision = hub_name(path, revision)
    return model


def build(
    cls: type[Model],
    stored: StoredModel,
    dtype: torch.dtype | None,
    overrides: dict[str, Any],
    quantize: str | None = None,
    double_quant: bool = False,
) -> Model:
    """As `load`, from files that are open already."""
    config = longer.changed(stored.config, overrides)
    model = on_meta(cls, config)
    packing = None if quantize is None else Packing(model, quantize, double_quant)
    stretch = longer.OWNER in overrides
    model.load_state_dict(read_weights(stored, model, dtype, packing, stretch), assign=True)
    if packing is not None:
        packing.put_into(model)
    model.tie_weights()
    if config.position_embedding == "sinusoidal":
        model.wpe = model.wpe.to(model.wte.weight.dtype)
    model.metadata = deepcopy(stored.metadata)
    return model.eval()


def on_meta(cls: type[Model], config: GPTConfig) -> Any:
    """A model of a class with metadata whose parameters have no values; what is computed, as sinusoids, has."""
    with only_shapes():
        model: Any = cls(config)
    with torch.device("cpu"):  # where the weights will be, whatever torch's default is
        if config.position_embedding == "sinusoidal":
            model.wpe = SinusoidalEmbedding(config.block_size, config.n_embd)
        elif config.position_embedding == "rotary":
            model.rotary = RotaryEmbedding(config)
    return model


def read_lazily(
    cls: type[Model], stored: StoredModel, overrides: dict[str, Any]
) -> tuple[Any, Callable[[str], Tensor]]:
    """A model without values, see `on_meta`, and a function that reads those of a parameter, by its name, in float32.

    Raises:
        ValueError: tensors are missing; or when it is read, one is ill-shaped.
    """
    config, rows = longer.changed(stored.config, overrides), stored.config.block_size
    model = on_meta(cls, config)
    model.metadata = deepcopy(stored.metadata)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if config.position_embedding == "learned":
        shapes["wpe.weight"] = (rows, config.n_embd)
    keys = {name: key for key in stored.shapes() if (name := hf_layout.from_file(key)) is not None}
    if config.tie_weights and "lm_head.weight" in keys:  # transformers may store either of two that are one
        keys.setdefault("wte.weight", keys["lm_head.weight"])
    problems = _missing(dict.fromkeys(keys, torch.empty(0)), shapes, config)
    if problems:
        raise _unfit(stored, problems)

    def read(name: str) -> Tensor:
        key = keys[name]
        found, transposed = stored.tensor(key), stored.conv1d and hf_layout.is_conv1d(name)
        if problem := _problem(name, found, shapes, config, transposed):
            raise _unfit(stored, [f"{key} {problem}"])
        x = found.read()
        x = x.t() if transposed else x
        x = longer.fitted(x, config.block_size, longer.OWNER in overrides) if name == "wpe.weight" else x
        return x.float().contiguous()

    return model, read


def read_weights(
    stored_model: StoredModel,
    model: Transformer,
    dtype: torch.dtype | None = None,
    packing: Taking | None = None,
    stretch: bool = False,
) -> dict[str, Tensor]:
    """state_dict of `model` (on the meta device) from the files, all of it checked; a model with a shorter block_size
    takes the first positions, with `stretch` all of them, interpolated. What `packing` takes stays on the meta device here.

    Raises:
        OSError, ValueError: see `load`.
    """
    config, rows = model.config, stored_model.config.block_size
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.position_embedding == "learned" and (stretch or config.block_size < rows):
        shapes["wpe.weight"] = (rows, config.n_embd)
    state: dict[str, Tensor] = {}
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for key, stored in stored_model.tensors():
        name = hf_layout.from_file(key)
        if name is None:
            continue
        transposed = stored_model.conv1d and hf_layout.is_conv1d(name)
        problem = _problem(name, stored, shapes, config, transposed)
        if problem:
            problems.append(f"{key} {problem}")
        elif name in shapes:
            found[name] = stored
            if packing is not None and packing.take(name, stored, transposed, dtype):
                state[name] = torch.empty(shapes[name], dtype=dtype or stored.dtype, device="meta")
                continue
            x = longer.fitted(stored.read(), config.block_size, stretch) if name == "wpe.weight" else stored.read()
            x = x.t() if transposed else x
            state[name] = torch.empty(x.shape, dtype=dtype or x.dtype, device="cpu").copy_(x)
    problems = problems or _tie(state, found, config) or _missing(state, shapes, config)
    head = next((problem.split()[0] for problem in problems if problem.startswith(_HEADS)), None)
    if head is not None:
        raise ValueError(
            f"{stored_model.path} is a checkpoint of a task, with the head {head}; load it with "
            "gptfast.finetuning.TaskModel.from_pretrained"
        )
    if problems:
        raise _unfit(stored_model, problems)
    return state


def _unfit(stored: StoredModel, problems: list[str]) -> ValueError:
    more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
    return ValueError(
        f"{stored.path}: the weights do not fit {stored.settings}: {'; '.join(problems[:4])}{more}; use the "
        f"{stored.settings} and the weights of one checkpoint"
    )


def _tie(state: dict[str, Tensor], found: dict[str, StoredTensor], config: GPTConfig) -> list[str]:
    """Let the head be the embedding, if the config ties them; a file may store either, and one with both must agree."""
    if config.tie_weights and "lm_head.weight" in state:
        state.setdefault("wte.weight", state["lm_head.weight"])
    if not config.tie_weights or "wte.weight" not in state:
        return []
    head, embedding = state.setdefault("lm_head.weight", state["wte.weight"]), state["wte.weight"]
    if head is embedding or (_same(found) if head.is_meta else torch.equal(head, embedding)):
        return []
    return ["lm_head.weight differs from wte.weight, to which the config ties it (load with tie_weights=False?)"]


def _same(found: dict[str, StoredTensor]) -> bool:
    """Whether head and embedding have the same values, both read some rows at a time."""
    head, embedding = found["lm_head.weight"], found["wte.weight"]
    parts = ((n, n + EQUAL_ROWS) for n in range(0, head.shape[0], EQUAL_ROWS))
    return all(torch.equal(head.read(*part), embedding.read(*part)) for part in parts)


def _missing(state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], config: GPTConfig) -> list[str]:
    kind = hf_layout.model_type(config)
    return [f"{hf_layout.to_file(name, kind)} is missing" for name in shapes if name not in state]


def _problem(
    name: str, stored: StoredTensor, shapes: dict[str, tuple[int, ...]], config: GPTConfig, transposed: bool
) -> str | None:
    """What is wrong with a stored tensor, or None."""
    if not stored.dtype.is_floating_point:
        return f"has dtype {stored.dtype}; expected a float dtype"
    if name not in shapes:
        if config.bias or not name.endswith("bias"):
            return "is unexpected"
        return "is not zero, but the config says bias=false" if stored.read().any() else None
    expected = shapes[name][::-1] if transposed else shapes[name]
    if stored.shape != expected:
        return f"has shape {stored.shape}; expected {expected}"
    return None
