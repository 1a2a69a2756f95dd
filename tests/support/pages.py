"""Pages of the documentation as something to run: their blocks, and a reader who does in a small folder what they say."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shlex
import shutil
import string
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.support import ROOT
from tests.support.train_command import SMALL, gptfast

SHORT = [*SMALL, "--block-size", "128", "--max-steps", "4", "--eval-every", "2", "--eval-batches", "2"]
TEXT = "ROMEO: what light through yonder window breaks?\nIt is the east, and Juliet is the sun. " * 80
TEXT += string.printable[:94] + "\n"  # so that each prompt has letters of the model
ELSEWHERE = {  # commands that are not run from the pages: the tests that run them
    "pip install ": "tests/repository/test_site.py",  # the names of the extras; RELEASING.md and `make release` install
    "make ": "tests/repository/test_docs.py",
    "source ": "",
    "pre-commit ": "",
    "tensorboard ": "tests/training/test_boards.py",
    "torchrun ": "tests/cli/test_torchrun.py",
    "lm-eval ": "tests/serving/test_serve_harness.py",
    "python -m gptfast.evaluation.harness": "tests/evaluation/test_harness.py",
    "python -m gptfast.training.simulate": "tests/training/test_simulate.py",
    "python examples/": "tests/integrations/test_pages_and_examples.py",
    "gptfast watch runs/bard --serve": "tests/cli/test_watch_page.py",
    "gptfast bench": "tests/benchmarking/test_bench.py",
    "gptfast doctor": "tests/cli/test_doctor.py",
    "gptfast scaling --data": "tests/ladder/test_ladder.py",
}
COMMANDS = r"(?:\$ )?(?:gptfast|python3?|pip|torchrun|curl|make|printf|echo|lm-eval|tensorboard|source|docker|ssh|git) "


class Block(NamedTuple):
    """A fenced block. reason: not to run it. file: whose content it is."""

    language: str
    text: str
    reason: str
    file: str


def blocks(page: Path) -> list[Block]:
    pattern = r"(?:<!-- (not run|file): (.*?) -->\n)?^```(\w*)\n(.*?)^```"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), re.M | re.S)
    return [
        Block(language, text, about if kind == "not run" else "", about if kind == "file" else "")
        for kind, about, language, text in found
    ]


def lines_of(console: str) -> list[str]:
    """The commands of a console block; one that goes on in the next line is one."""
    found, whole = [], ""
    for line in console.replace("\\\n", " ").splitlines():
        whole = f"{whole}\n{line}" if whole else line.removeprefix("$ ")
        with contextlib.suppress(ValueError):  # a quotation that goes on
            words = shlex.split(whole, comments=True)
            if not whole.split("#")[0].rstrip().endswith("|"):
                found += [whole] if words else []
                whole = ""
    assert not whole, f"the block ends within {whole!r}"
    return found


class Reader:
    """Does what pages say, in the working folder: one session of Python, commands on small data, a real server.

    close: ends the servers that the pages began.
    """

    def __init__(self) -> None:
        self.names: dict[str, Any] = {}
        self.did: set[str] = set()
        self._stack, self._url = contextlib.ExitStack(), ""
        self.close = self._stack.close

    def read(self, page: Path, python: bool = True) -> None:
        """Every block of a page. python: False: its Python is run elsewhere."""
        for n, block in enumerate(blocks(page)):
            if block.file:
                Path(block.file).parent.mkdir(parents=True, exist_ok=True)
                Path(block.file).write_text(block.text)
            elif block.language == "python" and python and not block.reason:
                exec(compile(block.text, f"{page.name}, block {n}", "exec"), self.names)
            elif block.language == "bash":
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            elif block.language == "console" and not block.reason:
                for line in lines_of(block.text):
                    if line not in self.did:
                        self.run(line, page)
                        self.did.add(line)

    def run(self, line: str, page: Path) -> None:
        words = shlex.split(line, comments=True)
        if "|" in line:
            return self._pipe(line)
        if words[0] == "curl":
            return self._curl(line)
        plain = " ".join(words)
        if any(plain.startswith(name.strip()) for name in ELSEWHERE):
            return
        assert words[0] == "gptfast", f"{page.name}: {line}"
        if words[1] == "serve":
            return self._serve(words)
        out = io.StringIO()
        if ">" in words:
            words, [name] = words[: words.index(">")], words[words.index(">") + 1 :]
            with contextlib.redirect_stdout(out):
                assert gptfast(*as_small(words)) == 0, f"{page.name}: {line}"
            Path(name).write_text(out.getvalue())
            return
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))  # of gptfast chat
            assert gptfast(*as_small(words)) == 0, f"{page.name}: {line}"

    def _serve(self, words: list[str]) -> None:
        """`gptfast serve`, on a free port in this process, until the reader closes."""
        from gptfast.serving import server
        from tests.support.serving_app import serving

        def run(app: Any, bound: Any) -> None:
            self._url = self._stack.enter_context(serving(app))

        bind = server.bind
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server, "run", run)
            patch.setattr(server, "bind", lambda host, port: bind(host, 0))
            assert gptfast(*words[1:]) == 0

    def _curl(self, line: str) -> None:
        if shutil.which("curl") is None:
            pytest.skip("no curl is installed")
        asked = line.replace("http://127.0.0.1:8000", self._url).split("#")[0]
        done = subprocess.run(["bash", "-c", f"{asked} -s -S"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        if not done.stdout.startswith("data: "):
            found = json.loads(done.stdout)
            assert "object" in found or "error" in found, done.stdout

    def _pipe(self, line: str) -> None:
        shell = re.sub(r"\bgptfast ", f"{sys.executable} -m gptfast ", line)
        done = subprocess.run(["bash", "-o", "pipefail", "-c", shell], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


def as_small(words: list[str]) -> list[str]:
    """The words of a command behind its first one, on small data and for few steps."""
    names = {"shakespeare": "text.txt"}
    words = [names.get(word, word) for word in words[1:]]
    more: list[str] = []
    if words[0] == "train":
        again = "--resume" in words or "--print-config" in words
        more = ["--max-steps", "6"] if "--resume" in words else SHORT if again else ["--overwrite", *SHORT]
        more += ["--grad-accum", "1"] if "--recipe" in words else []
        if "--extend-context" in words:  # has the block size
            own = [n for n, word in enumerate(more) if word == "--block-size"]
            more = [word for n, word in enumerate(more) if n not in own and n - 1 not in own]
    elif words[0] == "finetune":
        more = ["--overwrite", *SMALL[-6:], "--max-steps", "2", "--eval-every", "1", "--batch-size", "2"]
    elif words[0] == "evaluate" and "--task" in words:
        more = ["--limit", "3"] + (["--max-new-tokens", "4"] if "--samples" in words else [])
    return [*words, *more]


def prepare(folder: Path) -> None:
    """The data that the pages name, small."""
    (folder / "text.txt").write_text(TEXT)
    for name in ("plays.txt", "big.txt", "mine.txt", "my.txt", "wiki.txt", "sonnets.txt", "notes/a.md", "notes/b.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(TEXT[: 1 << 11] if name.startswith("sonnets") else TEXT)
    for name in ("corpus", "books"):
        (folder / name).mkdir()
        (folder / name / "one.txt").write_text(TEXT)
        (folder / name / "two.txt").write_text(TEXT[::-1])
    sources = "".join(f'[[source]]\nname = "{name}"\ndata = "{name}.txt"\nweight = 1\n' for name in ("wiki", "plays"))
    (folder / "mixture.toml").write_text(sources)
    rows = [{"text": TEXT[n : n + 90], "body": TEXT[n : n + 90], "label": "ab"[n % 2]} for n in range(40)]
    reviews = [{"text": f"No dull scene {n}.", "label": ("positive", "negative")[n % 2]} for n in range(8)]
    files = {"posts": rows, "train": rows, "test": rows[:6], "sonnets": rows[:4], "reviews": reviews}
    files["chats"] = [{"prompt": f"to be {n}?", "response": "or not to be"} for n in range(8)]
    files["prompts"] = [{"prompt": "ROMEO:", "max_new_tokens": 4}]
    (folder / "wiki").mkdir()
    draw = random.Random(0)  # no two alike, for --drop-near-duplicates
    files["wiki/pages"] = [
        {"text": " ".join("".join(draw.sample("abcdefgh", 3)) for _ in range(30))} for _ in range(40)
    ]
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def make_models(folder: Path) -> None:
    """runs/bard, two adapters of it, and a small stand-in for the model gpt2."""
    import gptfast as package
    from gptfast.finetuning import LoraConfig
    from gptfast.tokenizer import load_tokenizer

    assert gptfast("train", "--data", folder / "text.txt", "--out", folder / "runs/bard", *SHORT) == 0
    for name in ("poems", "plays"):
        model = package.GPT.from_pretrained(folder / "runs/bard/best")
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False), name)
        model.save_adapter(folder / "runs" / name, name)
    tokenizer = load_tokenizer("gpt2")
    sizes: dict[str, Any] = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 512}
    package.GPT(package.GPTConfig(vocab_size=tokenizer.vocab_size, **sizes)).save_pretrained(folder / "gpt2")
    tokenizer.save(folder / "gpt2")


def commands_outside_of_blocks(page: Path) -> list[str]:
    """Lines of indented blocks that are commands: only fenced blocks are run."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(rf"^ {{4,}}({COMMANDS}.*)$", text, re.M)


__all__ = ["ELSEWHERE", "ROOT", "Reader", "blocks", "commands_outside_of_blocks", "lines_of", "make_models", "prepare"]
