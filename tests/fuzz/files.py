"""Files from elsewhere: damaged ones are read, or refused with an error that names them."""

from __future__ import annotations

import random
import shutil
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptfast import GPT, GPTConfig, engine
from gptfast.batch import read_jobs, run_jobs
from gptfast.data.prepared import load_prepared, prepare
from gptfast.data.token_file import TokenFile, write_tokens
from gptfast.generation import GenerationConfig, score
from gptfast.models.parameter_table import parameter_table
from gptfast.models.stored import read_settings
from gptfast.tokenizer import BPETokenizer, CharTokenizer, OpenAIGPTTokenizer, WordTokenizer, load_tokenizer
from gptfast.training.checkpoint import check_source, read_checkpoint, save_checkpoint
from gptfast.training.config import TrainConfig
from gptfast.training.log import Log, read_log
from gptfast.training.optim import build_optimizers
from gptfast.training.parts import load_optimizers
from gptfast.training.train_state import TrainState

from . import mutate, runner

TEXT = "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer " * 8
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
JOBS = [
    '"To be"',
    '{"prompt": "or", "temperature": 0.5, "seed": 3, "stop_strings": ["e"]}',
    '{"prompt": "a", "num_beams": 2}',
]


def run(seconds: float, seed: int = 0) -> runner.Report:
    """Damage files for about so many seconds."""
    return runner.campaign("files", make, seconds, seed)


class Files:
    """A kind of file or folder: how one is made, and what is done with a damaged one."""

    def __init__(self, write: Callable[[Path], Any], read: Callable[[Path], Any], writes: bool = False) -> None:
        self.write, self.read, self.writes = write, read, writes


def make() -> runner.Case:
    """A case damages a file of a folder and reads it."""
    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="gptfast-fuzz-"))
    templates = {name: place / "whole" / name.replace(" ", "-") for name in KINDS}
    for name, folder in templates.items():
        folder.mkdir(parents=True)
        KINDS[name].write(folder)

    def case(rng: random.Random) -> tuple[str, str | None]:
        name = rng.choice(list(KINDS))
        folder = place / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(templates[name], folder)
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        damaged = {}
        for file in rng.sample(files, rng.choice([1, 1, 1, 2]) if len(files) > 1 else 1):
            damaged[file.name] = mutate.mutate_file(rng, file)
        before = _state(folder)
        found = read_damaged(KINDS[name], folder, damaged)
        if found is None and not KINDS[name].writes and _state(folder) != before:
            found = "reading has changed the folder"
        return name, found and f"{name}, damaged: {damaged}\n{found}"

    return case


def read_damaged(kind: Files, folder: Path, damaged: dict[str, str]) -> str | None:
    """What is wrong with how damaged files are read, or None."""
    try:
        kind.read(folder)
    except (ValueError, OSError) as error:
        if str(folder) not in str(error) and not any(name in str(error) for name in damaged):
            return f"an error that names no file: {traceback.format_exc(limit=-3)}"
    except Unusable:
        pass
    except BaseException:
        return traceback.format_exc(limit=-6)
    return None


class Unusable(Exception):
    """What was read is whole, and cannot be used: the right error was raised for that."""


def use(call: Callable[[], Any], *named: str) -> None:
    """Use what was read; an error is one of ours where it begins with one of the names."""
    try:
        call()
    except (ValueError, RuntimeError, TypeError) as error:
        if not str(error).startswith(named):
            raise
        raise Unusable from error


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(f): (f.lstat().st_size, f.lstat().st_mtime_ns) for f in sorted(folder.rglob("*"))}


# ---- models ----


def small(**options: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SHAPE, "vocab_size": 40, "dropout": 0.0, **options})).eval()


def read_model(folder: Path) -> None:
    parameter_table(read_settings(folder)[0])
    model = GPT.from_pretrained(folder)
    with torch.inference_mode():
        model(torch.tensor([[1, 0]])[:, : model.config.block_size] % model.config.vocab_size)
    model.metadata.end_tokens(model.config.vocab_size, [None, 3])
    use(lambda: GenerationConfig.of(**model.metadata.defaults()), "generate:")
    use(lambda: model.generate([[0]], max_new_tokens=1), "generate:", "compile", "engine", "GPT")


def write_model(**options: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        model = small(**options)
        model.metadata.config |= {"eos_token_id": 3, "task_specific_params": {"x": [1]}}
        model.metadata.generation = {
            "eos_token_id": [3, 5],
            "do_sample": True,
            "temperature": 0.5,
            "top_k": 3,
            "top_p": 0.9,
        }
        model.save_pretrained(folder)

    return write


def read_packed(folder: Path) -> None:
    model = engine.load(folder / "model.gptfast")
    ids = [n % model.config.vocab_size for n in range(1, 6)][: model.config.block_size]
    if len(ids) > 1:
        use(lambda: score(model, ids), "generate:")  # nan
    runner = model.runner(2)
    rows = runner.allocate(2)
    for _ in range(3):
        if max(runner.lengths) < min(runner.max_len, 64):
            runner.extend(rows, [[0], [0]])
    use(lambda: model.generate([ids[:1]], max_new_tokens=min(4, model.config.block_size - 1) or 1), "generate:")


def packed(dtype: str, **options: Any) -> Files:
    return Files(
        lambda folder: small(**options).compile_for_inference(dtype).save(folder / "model.gptfast"), read_packed
    )


def write_training(folder: Path) -> None:
    model, config = small(), TrainConfig(batch_size=2, max_steps=4)
    optimizers = build_optimizers(model, config)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    source = {"data": "text.txt", "options": {"tokenizer": "char"}, "marks": {"train": [5, 6], "val": [1, 2]}}
    tokenizer = CharTokenizer("".join(map(chr, range(65, 105))))
    save_checkpoint(folder / "last", model, optimizers, tokenizer, TrainState(step=3), config, source)
    log = Log(folder / "log.jsonl")
    for step in range(1, 5):
        log.write(step=step, loss=4.0 / step, seconds=0.5)
    log.close()


def read_training(folder: Path) -> None:
    read_log(folder / "log.jsonl")
    checkpoint = read_checkpoint(folder / "last")
    check_source(checkpoint)
    model = GPT.from_pretrained(folder / "last")
    load_optimizers(folder / "last", model, build_optimizers(model, checkpoint.config))
    load_tokenizer(folder / "last")


# ---- texts and tokens ----


def write_fast(folder: Path) -> None:
    """As the `tokenizers` library writes it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ours = BPETokenizer.train(TEXT, 280)
    theirs = Tokenizer(models.BPE(vocab=ours.vocab, merges=ours.merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')


def write_gpt1(folder: Path) -> None:
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<unk>", *letters, *(c + "</w>" for c in letters), "to</w>", "be</w>"]
    OpenAIGPTTokenizer({t: n for n, t in enumerate(tokens)}, [("t", "o</w>"), ("b", "e</w>")]).save(folder)


def read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)

    def there_and_back() -> None:
        for text in ("to be", TEXT[:200]):
            tokenizer.decode(tokenizer.encode(text))
        tokenizer.decode_bytes([tokenizer.vocab_size - 1])

    use(there_and_back, *("CharTokenizer", "WordTokenizer", "BPETokenizer", "OpenAIGPTTokenizer"))


def write_text_tokens(folder: Path) -> None:
    write_tokens(folder / "x.bin", [[1, 2, 3], [4], list(range(30))], vocab_size=40, eos_id=0)


def read_tokens(folder: Path) -> None:
    file = TokenFile.open(folder / "x.bin")
    file.verify()
    if len(file) > 1:
        for part in file.split(0.3):
            int(part.tokens.sum())


def write_prepared(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    prepare(folder / "text.txt", "char", folder, progress=False)


def write_jobs(folder: Path) -> None:
    (folder / "in.jsonl").write_text("\n".join(JOBS) + "\n")
    read_batch(folder)


def read_batch(folder: Path) -> None:
    tokenizer = CharTokenizer("Tobe,rna ")
    model = small(vocab_size=tokenizer.vocab_size)
    jobs = read_jobs(folder / "in.jsonl", model, tokenizer, {"max_new_tokens": 3})
    if all(job.config.num_return_sequences <= 8 and job.config.num_beams <= 8 for job in jobs):
        run_jobs(jobs, folder / "out.jsonl", model, tokenizer)


def saved(tokenizer: Callable[[], Any]) -> Files:
    return Files(lambda folder: tokenizer().save(folder), read_tokenizer)


KINDS = {
    "gpt2": Files(write_model(), read_model),
    "gpt1": Files(write_model(norm_position="post", final_norm=False), read_model),
    "banded": Files(
        write_model(attention_pattern="alternating", window=4, position_embedding="sinusoidal"), read_model
    ),
    "shards": Files(lambda folder: small().save_pretrained(folder, max_shard_size=9000), read_model),
    "packed fp32": packed("float32"),
    "packed int8": packed("int8", n_embd=32),
    "packed q4": packed("q4", n_embd=64, tie_weights=False),
    "training": Files(write_training, read_training),
    "char": saved(lambda: CharTokenizer.train(TEXT)),
    "word": saved(lambda: WordTokenizer.train(TEXT)),
    "bpe": saved(lambda: BPETokenizer.train(TEXT, 280)),
    "fast": Files(write_fast, read_tokenizer),
    "gpt1 tokenizer": Files(write_gpt1, read_tokenizer),
    "tokens": Files(write_text_tokens, read_tokens),
    "prepared": Files(write_prepared, load_prepared),
    "batch": Files(write_jobs, read_batch, writes=True),
}
