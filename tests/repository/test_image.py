"""Dockerfile: built and run where a container engine answers; else each of its steps is done here, in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import tomlkit
from packaging.requirements import Requirement

from gptfast.cli.serve import ServeOptions
from gptfast.tokenizer import CharTokenizer
from tests.support import ROOT
from tests.support.command import LETTERS, save_model

pytestmark = pytest.mark.skipif(not (ROOT / "Dockerfile").exists(), reason="not run from the source tree")
Step = tuple[str, str]


def steps() -> list[Step]:
    """The instructions of the Dockerfile: name and arguments."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines)]


def engine() -> str | None:
    """The program that builds images here: its service answers."""
    for name in ("docker", "podman"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if subprocess.run([name, "info"], capture_output=True, timeout=20).returncode == 0:
                return name
    return None


def ask(url: str) -> None:
    """That the server of an image has a page, wants its key, and writes."""
    httpx = pytest.importorskip("httpx")
    body = {"model": "model", "prompt": "to be", "max_tokens": 5, "temperature": 0}
    assert httpx.get(url + "/").status_code == 200
    assert httpx.post(url + "/v1/completions", json=body).status_code == 401
    answer = httpx.post(url + "/v1/completions", json=body, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 5


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", CharTokenizer.train(LETTERS))
    return tmp_path / "model"


@pytest.mark.slow
def test_the_image_is_built_and_serves(model: Path):
    program = engine()
    if program is None:
        pytest.skip("no docker or podman answers: test_the_steps_of_the_image does its steps")
    subprocess.run([program, "build", "--tag", "gptfast-test", str(ROOT)], check=True)
    options = ["--detach", "--rm", "-p", "127.0.0.1::8000", "-e", "GPTFAST_API_KEY=secret", "-v", f"{model}:/model:ro"]
    model.chmod(0o755)
    started = subprocess.run([program, "run", *options, "gptfast-test"], capture_output=True, text=True, check=True)
    name = started.stdout.strip()
    try:
        shown = subprocess.run([program, "port", name, "8000"], capture_output=True, text=True, check=True)
        url = "http://" + shown.stdout.split()[0]
        httpx = pytest.importorskip("httpx")
        for _ in range(120):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(url + "/health").status_code == 200:
                    break
            time.sleep(0.5)
        ask(url)
    finally:
        subprocess.run([program, "stop", name], capture_output=True)


class Root:
    """A folder in the place of the image's root.

    Packages are links to those of this environment, and only to those that `requirements` finds: pip sees them as installed, and
    what is missing in a list of requirements is missing here. Nothing is downloaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "VIRTUAL"))
        }
        self.env |= {"GPTFAST_BUILD": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def place(self, path: str) -> str:
        return str(self.folder / path.lstrip("/"))

    def run(self, command: str) -> None:
        """A RUN: each of its commands is done, or, where it changes the system, tried."""
        for part in command.split("&&"):
            words = shlex.split(part)
            tried = {"apt-get": self._apt, "rm": lambda words: None, "useradd": self._useradd}
            if (call := tried.get(words[0])) is not None:
                call(words)
            elif words[:3] == ["python", "-m", "venv"]:
                subprocess.run([sys.executable, "-m", "venv", self.place(words[3])], check=True)
                self._link(requirements(), Path(self.place(words[3])))
            elif words[:2] == ["pip", "install"]:
                self._pip(words)
            else:
                pytest.fail(f"the Dockerfile has a command that no test does: {part.strip()}")

    def _apt(self, words: list[str]) -> None:
        if words[1] == "update" or shutil.which("apt-cache") is None:
            return
        for package in [word for word in words[2:] if not word.startswith("-")]:
            known = subprocess.run(["apt-cache", "policy", package], capture_output=True, text=True).stdout
            assert not known or re.search(r"Candidate: \d|Version table", known), f"Debian has no package {package}"

    def _useradd(self, words: list[str]) -> None:
        """In the files of this root; where this process may do so."""
        if shutil.which("useradd") is None or os.getuid() != 0:
            return
        (self.folder / "etc").mkdir()
        for name in ("passwd", "group", "shadow", "gshadow", "login.defs"):
            (self.folder / "etc" / name).touch()
        done = subprocess.run(["useradd", "--prefix", str(self.folder), *words[1:]], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert words[-1] in (self.folder / "etc/passwd").read_text()

    def _pip(self, words: list[str]) -> None:
        """Without an index: what it asks for is there."""
        if "--index-url" in words:
            at = words.index("--index-url")
            assert words[at + 1] in (ROOT / "Makefile").read_text(encoding="utf-8")
            del words[at : at + 2]
        words = [self.place(word) if word.startswith("/") else word for word in words]
        done = subprocess.run([*words, "--no-index"], env=self.env, capture_output=True, text=True, cwd=self.folder)
        assert done.returncode == 0, done.stdout + done.stderr

    def _link(self, wanted: list[Requirement], venv: Path) -> None:
        [site] = venv.glob("lib/python*/site-packages")
        for old in (
            path for path in site.iterdir() if not path.name.startswith("pip")
        ):  # setuptools of an older Python
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        for requirement in wanted:
            found = metadata.distribution(requirement.name)
            for top in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
                if not (site / top).exists():
                    (site / top).symlink_to(Path(str(found.locate_file(top))).resolve())
            for file in found.files or []:
                if file.parts[0] == ".." and file.parts[-2] == "bin" and not (venv / "bin" / file.name).exists():
                    shutil.copy(Path(str(found.locate_file(file))).resolve(), venv / "bin" / file.name)


def requirements() -> list[Requirement]:
    """What torch, the build and the package with the image's extras ask for, and what that asks for in turn."""
    project = tomlkit.parse((ROOT / "pyproject.toml").read_text(encoding="utf-8")).unwrap()["project"]
    extras = re.findall(r"/src/\.\[(\w+)\]", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    asked = [*project["dependencies"], "torch", "setuptools", "ninja", "wheel"]
    asked += [text for extra in extras for text in project["optional-dependencies"][extra]]
    left, found = [Requirement(text) for text in asked], dict[str, Requirement]()
    while left:
        one = left.pop()
        if one.name.lower() in found:
            continue
        found[one.name.lower()] = one
        for text in metadata.requires(one.name) or []:
            other = Requirement(text)
            extras = one.extras or {""}
            if other.marker is None or any(other.marker.evaluate({"extra": extra}) for extra in extras):
                left.append(other)
    return list(found.values())


@contextlib.contextmanager
def served(command: list[str], env: dict[str, str], folder: Path) -> Iterator[str]:
    """The URL of the server that a command starts."""
    with subprocess.Popen(command, env=env, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said, port = "", None
        for line in process.stderr:
            said += line
            if port := re.search(r"running on http://0\.0\.0\.0:(\d+)", line):
                break
        try:
            assert port, said
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            process.terminate()
            process.communicate(timeout=30)


@pytest.mark.slow
def test_the_steps_of_the_image(model: Path, tmp_path: Path):
    """Every line, in their order; kernels are not compiled here, as each install does that: they are those of this tree."""
    root, command, stages = Root(tmp_path / "root"), dict[str, list[str]](), 0
    root.folder.mkdir()
    for name, rest in steps():
        if name == "FROM":
            stages += 1
            version = re.match(r"python:(3\.\d+)-slim\b", rest)
            assert version and f"Python :: {version[1]}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        elif name == "ENV":
            key, _, value = rest.partition("=")
            assert key == "PATH"
            root.env["PATH"] = value.replace("/venv", root.place("/venv")).replace("$PATH", root.env["PATH"])
        elif name == "RUN":
            root.run(rest)
        elif name == "COPY" and rest.startswith("--from=build"):
            [_, source, target] = rest.split()
            assert source == target and Path(root.place(source)).exists()  # programs in it know their place
        elif name == "COPY":
            source, target = rest.split()
            ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
            assert source == "." and {".git", "build", "**/*.so"} <= set(ignored)
            names = [pattern.removeprefix("**/") for pattern in ignored]
            shutil.copytree(ROOT, root.place(target), ignore=shutil.ignore_patterns(*names, ".[a-z]*"))
        elif name in ("ENTRYPOINT", "CMD"):
            command[name] = json.loads(rest)
        elif name == "EXPOSE":
            assert int(rest) == ServeOptions.port
        else:
            assert name == "USER" and rest in "".join(text for _, text in steps() if text.startswith("useradd"))
    assert stages == 2
    [package] = (root.folder / "venv").glob("lib/python*/site-packages/gptfast")
    for library in (ROOT / "gptfast").glob("*.so"):
        shutil.copy(library, package)
    words = [root.place(word) if word.startswith("/") else word for word in [*command["ENTRYPOINT"], *command["CMD"]]]
    model.rename(root.folder / "model")
    program = shutil.which(words[0], path=root.env["PATH"])
    assert program and program.startswith(root.place("/venv"))
    with served([program, *words[1:], "--port", "0"], {**root.env, "GPTFAST_API_KEY": "secret"}, root.folder) as url:
        ask(url)
    refused = subprocess.run([program, *words[1:]], env=root.env, capture_output=True, text=True, cwd=root.folder)
    assert refused.returncode == 1 and "there is no API key" in refused.stderr, "as the Dockerfile says"
