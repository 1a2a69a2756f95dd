"""Checkpoints of a model that is divided among ranks: each writes its parts, and rank 0 puts those of the model together.

    optimizer-00001-of-00002.safetensors   rank 0's part of the optimizers' state, and so on

These are files of torch.distributed.checkpoint (its HuggingFaceStorageWriter): what each holds stands in its header, and any
number of processes reads its own parts. A file has one box (`gptfast.training.division.Box`) of a tensor, so with tensor
parallelism, where a rank has some rows each of queries, keys and values, it writes three. The model's parts go to
part-*.safetensors for the time of a save; rank 0 reads them as it fills the files of the model, so no process holds more of the
model than one file of it.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gptfast._files import checksum, open_read
from gptfast._folders import STAGE, explained, sync
from gptfast._large_files import summed
from gptfast._snapshots import current, current_files
from gptfast.models import GPT
from gptfast.models.export import Description, described, file_tensors, write_tensors
from gptfast.nn.difference import true_config
from gptfast.training.checkpoint import OPTIMIZER
from gptfast.training.copies import Copies
from gptfast.training.division import Box, Division, division_of, is_sharded, local
from gptfast.training.optim import empty_optimizer_tensors, optimizer_tensors, restore_optimizers
from gptfast.training.ranks import Ranks

_PART = re.compile(r"optimizer-(\d+)-of-(\d+)\.safetensors")
_WHAT = "the checkpoint"


class Parts:
    """This rank's parts of the model and of the optimizers' state, to be written together with those of the others.

    Args:
        ranks: of the run.
        number: of the save among those of this process; the same on all ranks.
        model, optimizers: sharded.
        copies: take copies, so that `lead` or `follow` may run in a thread while training goes on.
    """

    def __init__(
        self,
        ranks: Ranks,
        number: int,
        model: GPT,
        optimizers: Sequence[torch.optim.Optimizer],
        copies: Copies | None,
    ) -> None:
        self._ranks, self._key = ranks, f"save/{number}"
        parameters = dict(model.named_parameters())
        self._divisions = {name: division_of(name, p, ranks) for name, p in parameters.items()}
        self._model = _own(parameters, ranks, copies)
        state = optimizer_tensors(model, optimizers)
        files = 3 if ranks.tensor > 1 else 1
        self._state: list[dict[str, tuple[list[int], Tensor]]] = [{} for _ in range(files)]  # offsets, values
        for name, x in _own(state, ranks, copies).items():
            pieces = division_of(name, state[name], ranks).pieces(x) if x.dim() else [((), x)]
            for file, (box, piece) in zip(self._state, pieces, strict=False):
                file[name] = [s.start for s in box], piece
        with torch.device("meta"):
            twin = GPT(model.config)
        twin.metadata = model.metadata
        self._twin = twin.to(model.wte.weight.dtype)  # the whole model, without values

    def lead(self, save: Callable[[Callable[[Path], dict[str, str]]], None]) -> None:
        """On rank 0: call save(content), where content writes the parts of all ranks to a folder and returns checksums."""
        try:
            save(self._gathered)
        except BaseException:
            self._ranks.claims()  # before the others see it
            raise
        self._ranks.meet(_WHAT)

    def follow(self, folder: Path) -> None:
        """On the others: write the parts to the folder that rank 0 fills, and wait until it is whole.

        Raises:
            RankLostError: another rank failed.  OSError: they cannot be written.
        """
        self._ranks.meet(_WHAT)
        try:
            with explained(folder):
                sums = self._write(Path(os.path.realpath(folder)) / STAGE)
        except BaseException:
            self._ranks.claims()
            raise
        self._ranks.tell(f"{self._key}/{self._ranks.rank}", json.dumps(sums))
        self._ranks.meet(_WHAT)
        self._ranks.meet(_WHAT)

    def _gathered(self, stage: Path) -> dict[str, str]:
        ranks = self._ranks
        ranks.meet(_WHAT)  # the folder is there
        sums = self._write(stage)
        ranks.meet(_WHAT)
        for rank in range(1, ranks.size):
            sums |= json.loads(ranks.ask(f"{self._key}/{rank}", _WHAT))
        files = [stage / _part(rank) for rank in range(ranks.size)]
        put_together(self._twin, files, self._divisions).write(stage)
        for file in files:
            file.unlink()
        return sums

    def _write(self, stage: Path) -> dict[str, str]:
        rank, size = self._ranks.rank, self._ranks.size
        with summed():  # not for the checkpoint: the file is removed, and the next one may get its inode
            write_tensors(stage / _part(rank), self._model)
        sums, count = {}, len(self._state)
        for number, own in enumerate(self._state, 1 + rank * count):
            file = stage / f"optimizer-{number:05d}-of-{size * count:05d}.safetensors"
            offsets = {name: {"saved_offsets": at} for name, (at, _) in own.items()}
            header = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
            write_tensors(file, {name: x for name, (_, x) in own.items()}, header)
            sync(file)
            sums[file.name] = checksum(file)
        return sums


def _part(rank: int) -> str:
    return f"part-{rank:05d}.safetensors"


def _own(tensors: Mapping[str, Tensor], ranks: Ranks, copies: Copies | None) -> dict[str, Tensor]:
    """This rank's parts that are not empty and that no rank before it has, on the CPU."""
    first = {
        name: division_of(name, x, ranks).is_first if is_sharded(x) else ranks.is_main for name, x in tensors.items()
    }
    own = {name: local(x).detach() for name, x in tensors.items() if first[name]}
    take = copies.take if copies is not None else Tensor.cpu
    return {name: take(x).contiguous() for name, x in own.items() if x.numel()}


def put_together(twin: GPT, files: Sequence[Path], divisions: Mapping[str, Division]) -> Description:
    """The files of a model whose parameters stand in parts.

    Args:
        twin: the model without values, on the meta device.
        files: with the parts of the first rank, of the second, and so on.
        divisions: of the parameters, by name.
    """
    whole, parts = described(twin), [safe_open(file, "pt") for file in files]
    names = [set(part.keys()) for part in parts]
    found = file_tensors(true_config(twin), twin.state_dict())

    def read(key: str) -> Tensor:
        name, form = found[key]
        own = {rank: part.get_tensor(name) for rank, part in enumerate(parts) if name in names[rank]}
        return form(divisions[name].put_together(own))

    return Description(whole.settings, whole.generation, whole.sizes, read)


def optimizer_parts(folder: Path) -> list[Path]:
    """The files of an optimizer's state that is in parts, in order; []: it is in one file, or there is none.

    Raises:
        FileNotFoundError: a part is missing.
    """
    found = {
        int(match[1]): (path, int(match[2])) for path in current_files(folder) if (match := _PART.fullmatch(path.name))
    }
    if not found:
        return []
    path, count = next(iter(found.values()))
    for number in range(1, count + 1):
        if number not in found:
            missing = path.with_name(f"optimizer-{number:05d}-of-{count:05d}.safetensors")
            raise FileNotFoundError(f"{missing} is missing; resume from another checkpoint, such as RUN/best")
    return [found[number][0] for number in range(1, count + 1)]


class _Boxes(Tensor):
    """A tensor of which this process has some boxes: what torch.distributed.checkpoint fills."""

    boxes: dict[torch.Size, Tensor]

    @staticmethod
    def __new__(cls, shape: torch.Size, pieces: Iterable[tuple[Box, Tensor]]) -> _Boxes:
        found = Tensor._make_wrapper_subclass(cls, shape)
        found.boxes = {torch.Size(s.start for s in box): piece for box, piece in pieces}
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(f"{func} of a tensor that is only read into")

    def __create_chunk_list__(self) -> list[Any]:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        return [ChunkStorageMetadata(offsets, piece.shape) for offsets, piece in self.boxes.items()]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        return self.boxes[index.offset]


def read_parts(files: Sequence[Path], wanted: dict[str, Tensor], ranks: Ranks | None = None) -> dict[str, Tensor]:
    """Fill tensors, of which this process may have a part only, from files that may hold them in other parts.

    Args:
        files: of `Parts`, or one file with whole tensors.
        wanted: by name; filled in place.
        ranks: that divide them.
    Returns:
        Those that the files have in the same shape.
    Raises:
        SafetensorError: a file is damaged.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader: Any = HuggingFaceStorageReader(str(files[0].parent))
    reader.fs.ls = lambda path: [str(file) for file in files]  # and not the model beside them
    stored = reader.read_metadata().state_dict_metadata
    found = {name: x for name, x in wanted.items() if name in stored and stored[name].size == x.shape}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as it is meant here
        boxes = {n: _Boxes(x.shape, division_of(n, x, ranks).pieces(local(x))) for n, x in found.items() if x.dim()}
        load(boxes, storage_reader=reader, no_dist=True)
    for file in files:  # the reader takes slices, which a scalar has none of
        with safe_open(file, "pt") as part:
            for name in set(part.keys()) & found.keys():
                if not found[name].dim():
                    found[name].copy_(part.get_tensor(name))
    return found


def load_optimizers(
    folder: Path, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], ranks: Ranks | None = None
) -> None:
    """Restore the optimizers' state from a checkpoint folder.

    Args:
        ranks: that divide the model.
    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, or belongs to another model.
    """
    path = current(folder, OPTIMIZER)
    parts = optimizer_parts(folder)
    if not (parts or path.exists()):
        raise FileNotFoundError(
            f"{path} is missing; start a new run from these weights with gptfast train --init-from {folder}"
        )
    open_read(parts[0] if parts else path).close()  # its errors name the file
    try:
        if parts or any(is_sharded(p) for p in model.parameters()):
            tensors = read_parts(parts or [path], empty_optimizer_tensors(model, optimizers), ranks)
        else:
            tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); resume from another checkpoint, such as RUN/best"
        ) from error
    restore_optimizers(model, optimizers, tensors, str(path))
