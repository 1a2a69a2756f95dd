"""Saves on a disk that fails: every kind of save, interrupted at any change of the disk, in seven ways.

For each: a child process saves the new over the old while the shim (disk_shim.c) makes its n-th change of the disk fail,
once or from then on, writes half of it, or kills the process there. Then

* a fresh reader finds the old or the new, whole, and changes nothing; the new where the save said that it went well;
* the save ended well, was killed, or raised OSError;
* one more save works.

`python -m tests.fuzz.disk_faults [SECONDS [SEED]]` runs it alone.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

SHIM = Path(__file__).with_name("disk_shim.c")
MODES = ["count", "EIO once", "EIO", "ENOSPC", "half, then ENOSPC", "SIGKILL", "half, then SIGKILL"]
OK, REFUSED, CRASHED = 0, 3, 4  # exit codes of a child


@dataclass
class Report:
    """What `run` did. findings: one text each. tried: faults by kind of save; possible: how many there are."""

    seed: int
    tried: dict[str, int]
    possible: dict[str, int]
    findings: list[str]


def run(seconds: float, seed: int = 0, names: str = "") -> Report:
    """Try faults in an order that the seed decides, for about so many seconds: each once at most,
    and one at least of every kind of save.

    names: kinds of save, with commas between them; "": all but "written in place", which shows that faults are found.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "disk_shim.so"
        compiler = os.environ.get("CC", "cc").split()
        subprocess.run([*compiler, "-O1", "-shared", "-fPIC", "-o", library, SHIM, "-ldl"], check=True)
        command = [sys.executable, __file__, "--worker", str(library), folder, str(seconds), str(seed), names]
        environment = {**os.environ, "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"disk_faults: the worker ended with {done.returncode}: {done.stderr[-2000:]}")
    return Report(**json.loads(done.stdout.splitlines()[-1]))


# ---- kinds of save --------------------------------------------------------------------------------------------------


@dataclass
class Kind:
    """A kind of save.

    save(folder, n) writes version n; read(folder) gives the versions that what is there is of; last: what 3 is read as.
    """

    save: Callable[[Path, int], object]
    read: Callable[[Path], set[int]]
    last: int = 3


def kinds(scratch: Path) -> dict[str, Kind]:
    """All kinds of save. scratch: a folder for their inputs."""
    found = {**_models(), **_tokenizers(), **_data(scratch), **_single_files(), "batch output": _batch(scratch)}
    return {**found, "written in place": _in_place()}


def _model(n: int) -> object:
    import torch

    from gptfast import GPT, GPTConfig

    model = GPT(GPTConfig(n_layer=1 + n % 2, n_head=1, n_embd=8, vocab_size=11, block_size=8, dropout=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(n)
    return model.eval()


def _model_version(folder: Path) -> set[int]:
    from gptfast import GPT

    model = GPT.from_pretrained(folder)
    values = {float(x) for tensor in model.state_dict().values() for x in (tensor.min(), tensor.max())}
    version = int(values.pop())
    if values or model.config.n_layer != 1 + version % 2:
        raise ValueError(f"a mixture: {model.config.n_layer} layers of {version} and {values}")
    return {version}


def _models() -> dict[str, Kind]:
    from gptfast.training import TrainConfig, read_checkpoint
    from gptfast.training.checkpoint import copy_checkpoint, save_checkpoint
    from gptfast.training.optim import build_optimizers
    from gptfast.training.train_state import TrainState

    def save_run(folder: Path, n: int) -> None:
        model, config = _model(n), TrainConfig()
        optimizers = build_optimizers(model, config)
        save_checkpoint(folder / "last", model, optimizers, None, TrainState(step=n), config, {})
        copy_checkpoint(folder / "last", folder / "best")

    def read_run(folder: Path) -> set[int]:
        found = set()
        for name in ("last", "best"):
            version = _model_version(folder / name)
            if version != {read_checkpoint(folder / name).state.step}:
                raise ValueError(f"{name}: the weights of {version} with another step")
            found |= version
        return found

    def sharded(folder: Path, n: int) -> None:
        _model(n).save_pretrained(folder, max_shard_size=1000)

    def in_turn(folder: Path, n: int) -> None:
        _model(n).save_pretrained(folder, max_shard_size=1000 if n % 2 else "5GB")

    return {
        "model": Kind(lambda folder, n: _model(n).save_pretrained(folder), _model_version),
        "shards": Kind(sharded, _model_version),
        "shards and one file in turn": Kind(in_turn, _model_version),
        "trainer": Kind(save_run, read_run),
    }


_TEXTS = {
    n: f"{word} the lazy dog, {word}s! " * 30
    for n, word in enumerate(["a quick fox", "seven zebra", "jumping judge"], 1)
}


def _tokenizers() -> dict[str, Kind]:
    from gptfast.tokenizer import get_tokenizer, load_tokenizer

    made = {n: get_tokenizer("bpe", text, 270 + n) for n, text in _TEXTS.items()}
    chars = {n: get_tokenizer("char", text) for n, text in _TEXTS.items()}

    def version(folder: Path) -> set[int]:
        found = load_tokenizer(folder)
        for tokenizers in (made, chars):
            for n, tokenizer in tokenizers.items():
                if found.vocab_size == tokenizer.vocab_size and found.encode("the dog") == tokenizer.encode("the dog"):
                    return {n}
        raise ValueError("a tokenizer that is none of those saved")

    return {
        "tokenizer": Kind(lambda folder, n: made[n].save(folder), version),
        "tokenizers of two kinds": Kind(lambda folder, n: (made if n % 2 else chars)[n].save(folder), version),
    }


def _data(scratch: Path) -> dict[str, Kind]:
    from gptfast.data import load_prepared, prepare

    for n, text in _TEXTS.items():
        (scratch / f"{n}.txt").write_text(text)

    def version(folder: Path) -> set[int]:
        found = load_prepared(folder)
        found.train.verify()
        found.val.verify()
        text = found.tokenizer.decode([*found.train.tokens.tolist(), *found.val.tokens.tolist()])
        return {n for n in _TEXTS if text.startswith(_TEXTS[n][:100])} or {-1}

    return {"tokens": Kind(lambda folder, n: prepare(scratch / f"{n}.txt", "bpe", folder, vocab_size=265), version)}


def _single_files() -> dict[str, Kind]:
    import numpy as np

    from gptfast._files import atomic_write
    from gptfast._json import read_json
    from gptfast.engine import load
    from gptfast.training.plot import plot_losses

    packed = {n: _model(n).compile_for_inference("float32") for n in _TEXTS}
    logits = {n: np.asarray(model.logits([[1, 2]])) for n, model in packed.items()}
    plots: dict[int, bytes] = {}

    def packed_version(folder: Path) -> set[int]:
        found = np.asarray(load(folder / "m.gptfast").logits([[1, 2]]))
        return {n for n, expected in logits.items() if np.array_equal(found, expected)} or {-1}

    def plot(folder: Path, n: int) -> None:
        plot_losses([{"step": k, "loss": float(n * k)} for k in range(5)], folder / "loss.png", str(n))

    with tempfile.TemporaryDirectory() as drawn:
        for n in _TEXTS:
            plot(Path(drawn), n)
            plots[n] = (Path(drawn) / "loss.png").read_bytes()

    return {
        "packed model": Kind(lambda folder, n: packed[n].save(folder / "m.gptfast"), packed_version),
        "JSON": Kind(
            lambda folder, n: atomic_write(folder / "x.json", json.dumps({"n": n, "more": "x" * 5000}).encode()),
            lambda folder: {read_json(folder / "x.json")["n"]},
        ),
        "plot": Kind(plot, lambda folder: {n for n in plots if plots[n] == (folder / "loss.png").read_bytes()} or {-1}),
    }


def _batch(scratch: Path) -> Kind:
    """A job goes on where it was: versions are how many of the lines are there, and 2 is all of them."""
    from gptfast.batch import read_jobs, run_jobs
    from gptfast.tokenizer import CharTokenizer

    prompts, tokenizer = scratch / "prompts.jsonl", CharTokenizer.train("abcdefghijk")
    prompts.write_text("".join(f'"{text}"\n' for text in ("ab", "cd", "efg", "h")))
    model = _model(0)
    jobs = read_jobs(prompts, model, tokenizer, {"max_new_tokens": 3, "temperature": 0.0})

    def save(folder: Path, n: int) -> None:
        run_jobs(jobs if n > 1 else jobs[:1], folder / "out.jsonl", model, tokenizer, batch_size=2)

    def version(folder: Path) -> set[int]:
        *lines, rest = (folder / "out.jsonl").read_bytes().split(b"\n")
        found = {json.loads(line)["line"] for line in lines}
        if not b'{"line": '.startswith(rest[:9]) or len(found) < len(lines):
            raise ValueError(f"not the lines of a job: {rest!r}")
        return {2} if len(found) == 4 else {1}

    return Kind(save, version, last=2)


def _in_place() -> Kind:
    """What a save must not be."""

    def save(folder: Path, n: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "x.json").write_text(json.dumps({"n": n, "more": "x" * 5000}))

    return Kind(save, lambda folder: {json.loads((folder / "x.json").read_text())["n"]})


# ---- the worker -----------------------------------------------------------------------------------------------------


class Campaign:
    """Runs in a process that the shim is loaded into; what saves and reads are children of it."""

    def __init__(self, library: str, scratch: Path, names: str) -> None:
        self.shim, self.scratch = ctypes.CDLL(library), scratch
        self.shim.shim_count.restype = ctypes.c_long
        wanted = names.split(",") if names else None
        self.kinds = {
            name: kind
            for name, kind in kinds(scratch).items()
            if (name != "written in place" if wanted is None else name in wanted)
        }
        self.folder = Path(os.path.realpath(scratch)) / "disk"
        for name, kind in self.kinds.items():  # here, so that the children find everything imported
            kind.save(scratch / "first" / name, 1)
            kind.read(scratch / "first" / name)

    def try_fault(self, name: str, mode: int, nth: int) -> tuple[list[str], int]:
        """One fault in one save; what went wrong, and how often the disk was changed."""
        kind, folder = self.kinds[name], self.folder
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.scratch / "first" / name, folder)
        code, text, count = self._child(lambda: kind.save(folder, 2), (nth, mode))
        problems = [f"the save ended with {code}: {text}"] if code not in (OK, REFUSED, -signal.SIGKILL) else []
        problems += self._look(kind, {2} if code == OK else {1, 2})
        code, text, _ = self._child(lambda: (kind.save(folder, 3), self._find(kind, {kind.last})))
        problems += [f"the next save: {text or code}"] if code else []
        where = f"{name}, {MODES[mode]} at change {nth} of the disk"
        return [f"{where}: {problem}" for problem in problems], count

    def _look(self, kind: Kind, expected: set[int]) -> list[str]:
        before = _tree(self.folder)

        code, text, _ = self._child(lambda: self._find(kind, expected))
        changed = ["the reader changed the folder"] if _tree(self.folder) != before else []
        return changed + ([f"a fresh reader: {text or code}"] if code else [])

    def _find(self, kind: Kind, expected: set[int]) -> None:
        found = kind.read(self.folder)
        if not found or not found <= expected:
            raise ValueError(f"found {found}, expected {expected}")

    def _child(self, work: Callable[[], object], fault: tuple[int, int] | None = None) -> tuple[int, str, int]:
        """Exit code, what was raised, and how many changes of the disk the shim counted."""
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(told)
            self._in_child(work, fault, tell)
        os.close(tell)
        with open(told, "rb") as pipe:
            text = pipe.read().decode(errors="replace")
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        count, _, text = text.partition(" ")
        return code, text, int(count or 0)

    def _in_child(self, work: Callable[[], object], fault: tuple[int, int] | None, tell: int) -> None:
        """Never returns."""
        signal.alarm(60)  # a save that hangs is a finding
        code, text = OK, ""
        if fault is not None:
            self.shim.shim_arm(os.fsencode(self.folder), *fault)
        try:
            work()
        except OSError as error:
            code, text = REFUSED, str(error)
        except BaseException as error:  # whatever it is: the parent reports it
            place = traceback.extract_tb(error.__traceback__)[-1]
            code, text = CRASHED, f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})"
        count = self.shim.shim_count()
        self.shim.shim_arm(b"", 0, 0)
        os.write(tell, f"{count} {text}".encode())
        os._exit(code)


def _tree(folder: Path) -> list[tuple]:
    return [(str(p), p.lstat().st_ino, p.lstat().st_mtime_ns, p.lstat().st_size) for p in sorted(folder.rglob("*"))]


def _work(library: str, scratch: Path, seconds: float, seed: int, names: str) -> Report:
    campaign, order = Campaign(library, scratch, names), random.Random(seed)
    possible = {name: campaign.try_fault(name, MODES.index("count"), 0)[1] for name in campaign.kinds}
    # The kinds take turns, each in an order of its own: all of them are met in a short time too.
    faults = {n: [(m, at) for m in range(1, len(MODES)) for at in range(1, count + 1)] for n, count in possible.items()}
    for each in faults.values():
        order.shuffle(each)
    report = Report(seed, dict.fromkeys(possible, 0), {n: len(each) for n, each in faults.items()}, [])
    end = time.monotonic() + seconds
    while any(faults.values()) and (time.monotonic() < end or not all(report.tried.values())):
        for name, each in faults.items():
            if each and (time.monotonic() < end or not report.tried[name]):
                report.findings += campaign.try_fault(name, *each.pop())[0]
                report.tried[name] += 1
    return report


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--worker"]:
        library, scratch, seconds, seed, names = arguments[1:]
        print(json.dumps(asdict(_work(library, Path(scratch), float(seconds), int(seed), names))))
        return 0
    report = run(float(arguments[0]) if arguments else 60.0, int(arguments[1]) if arguments[1:] else 0)
    for name, tried in report.tried.items():
        print(f"{name}: {tried} of {report.possible[name]} faults")
    print("\n".join(report.findings) or "no findings")
    return bool(report.findings)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
