"""A checkpoint, opened: what it says about its model and the shapes of its tensors, of one save and compared with each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gptfast._json import read_json
from gptfast._snapshots import current, read_whole
from gptfast.checkpoints import hf_layout
from gptfast.checkpoints.bert import with_heads
from gptfast.checkpoints.families import FAMILIES, usual_name
from gptfast.checkpoints.family_files import JoinedFile
from gptfast.checkpoints.hf_layout import CONFIG
from gptfast.checkpoints.weight_files import StoredTensor, WeightFile, has_weights, open_weights, weight_files
from gptfast.config import GPTConfig
from gptfast.metadata import Metadata, read_metadata
from gptfast.models import nanogpt
from gptfast.nn.meta import only_shapes
from gptfast.nn.transformer import Transformer

_COMPUTED = 2**27  # numbers in a computed table, which no file vouches for: 131,072 positions of 1,024 channels
_FIELDS = ("n_layer", "n_embd", "vocab_size", "block_size", "n_inner", "n_expert")
# what they are called where a checkpoint says them
OWN_SIZES: dict[str, str] = dict(zip(_FIELDS, _FIELDS, strict=True))
SIZES = OWN_SIZES | {"block_size": "n_positions"}
_NAMES = (
    *("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings", "intermediate_size"),
    "num_local_experts",
)
HF_SIZES: dict[str, str] = dict(zip(_FIELDS, _NAMES, strict=True))


class StoredModel:
    """What a checkpoint says about its model, before anything of its size is built or read.

    The files stay open, and `tensors` reads what was there when they were opened, whatever is saved over them.

    path: of the checkpoint. config, metadata: what it says. settings: where it says it, for messages.
    conv1d: whether the matrices are stored as (in, out), see `hf_layout.is_conv1d`.

    Args:
        path: a checkpoint folder; or nanoGPT's ckpt.pt, or a folder that holds that one and no config.json.
    Raises:
        FileNotFoundError: a file is missing in it.
        ValueError: a damaged or truncated file, another architecture, or numbers in config.json that the tensors
            contradict.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.settings = path, CONFIG
        self.metadata = Metadata()
        self._kind = "gpt2"  # whose names nanoGPT has
        self._files: Sequence[WeightFile]
        found = nanogpt.find(path)
        if found is not None:
            file = nanogpt.NanoGPTFile(found)
            self.config, self._files, self.conv1d, self.settings = file.config, [file], False, "model_args"
            self._compare(found, OWN_SIZES)
            return
        self.config, self.metadata, kind, self._files = read_whole(
            path,
            lambda: (*read_settings(path), kind_of(path), [open_weights(file) for file in weight_files(path)]),
        )
        self._kind, self.conv1d = kind, kind not in FAMILIES
        if kind == "bert":
            self.config = with_heads(
                self.config, {usual_name(kind, key) for file in self._files for key in file.shapes}
            )
        if not self.conv1d:
            self._files = [JoinedFile(path, self._files, kind, self.config, self._names())]
        self._compare(path / CONFIG, SIZES if self.conv1d else HF_SIZES)

    def tensors(self) -> Iterator[tuple[str, StoredTensor]]:
        """Every tensor, under its name in the file; it is read when it is asked for."""
        for file in self._files:
            for key in file.shapes:
                yield key, file.stored(key)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, under its name in the file."""
        return {key: shape for file in self._files for key, shape in file.shapes.items()}

    def tensor(self, key: str) -> StoredTensor:
        """The tensor of that name in the file."""
        return next(file for file in self._files if key in file.shapes).stored(key)

    def _names(self) -> list[str]:
        """Of the tensors of a network of this config; no more layers than the files have tensors."""
        self._check_layers(self.path / CONFIG, HF_SIZES["n_layer"])
        with only_shapes():
            return list(Transformer(self.config).state_dict())

    def _check_layers(self, file: Path, key: str) -> None:
        layers, tensors = self.config.n_layer, len(self.shapes())
        if layers > tensors:
            raise self._contradiction(file, key, layers, f"the weights are {tensors} tensors in all")

    def _compare(self, file: Path, keys: Mapping[str, str]) -> None:
        """Refuse numbers that the tensors contradict, so that what is built from them is about as large as the files.

        Raises:
            ValueError: naming the key in `file`.
        """
        stored = self.shapes()
        shapes = {hf_layout.from_file(key): (key, shape) for key, shape in stored.items()}
        if self.config.tie_weights and "lm_head.weight" in shapes:  # transformers may store either of two that are one
            shapes.setdefault("wte.weight", shapes["lm_head.weight"])
        self._check_layers(file, keys["n_layer"])
        for name, axis, field, value in self._sizes(file, keys["block_size"]):
            tensor, shape = shapes.get(name, (name, ()))
            if len(shape) < 2 or len(shape) <= axis or shape[axis] != value:
                got = f"{tensor} has shape {shape}" if shape else f"{hf_layout.to_file(name, self._kind)} is missing"
                raise self._contradiction(file, keys[field], value, got)

    def _sizes(self, file: Path, positions: str) -> list[tuple[str, int, str, int]]:
        """Tensors, and which of their axes is what in the config; numbers that no tensor has are bounded here."""
        config = self.config
        sizes = [("wte.weight", 1, "n_embd", config.n_embd), ("wte.weight", 0, "vocab_size", config.vocab_size)]
        width = config.rotary_dim if config.position_embedding == "rotary" else config.n_embd
        if config.position_embedding == "learned":
            sizes.append(("wpe.weight", 0, "block_size", config.block_size))
        elif config.block_size > (limit := max(1, _COMPUTED // width)):
            raise ValueError(f"{file}: {positions} is {config.block_size}; expected at most {limit} computed positions")
        if config.n_expert is not None:
            sizes.append(("h.0.mlp.router.weight", 0, "n_expert", config.n_expert))
            return [*sizes, ("h.0.mlp.gate_up_proj", 2, "n_inner", config.fc_dim)]
        return [*sizes, ("h.0.mlp.c_fc.weight", 1 if self.conv1d else 0, "n_inner", config.fc_dim)]

    def _contradiction(self, file: Path, key: str, value: int, got: str) -> ValueError:
        return ValueError(
            f"{file}: {key} is {value}, but {got}; use the {self.settings} and the weights of one checkpoint"
        )


def is_complete(path: Path) -> bool:
    """Whether a checkpoint holds weights, and not only their description."""
    return nanogpt.find(path) is not None or has_weights(path)


def kind_of(folder: Path) -> str:
    """The model_type of a checkpoint folder whose settings can be read."""
    return str(read_json(current(folder, CONFIG)).get("model_type"))


def read_settings(folder: Path) -> tuple[GPTConfig, Metadata]:
    """The configuration of a checkpoint folder, and what it says beside that.

    Raises:
        FileNotFoundError: there is none.  ValueError: damaged, of another architecture, or out of range.
    """
    file = current(folder, CONFIG)
    raw = read_json(file)
    values = hf_layout.from_hf(raw, file)
    try:
        config = GPTConfig(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return config, read_metadata(folder, hf_layout.extra_keys(raw), file)
