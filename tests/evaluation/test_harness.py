"""lm-evaluation-harness, the real package: our model beside `--model hf` on local tasks, the command, versions, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):  # before the import: no look-ups that time out
    os.environ.setdefault(_name, "1")
lm_eval = pytest.importorskip("lm_eval")

from gptfast.evaluation import harness  # noqa: E402
from gptfast.evaluation.continuations import ContinuationScorer  # noqa: E402
from gptfast.evaluation.harness_model import GPTFastLM  # noqa: E402
from tests.evaluation.harness_tasks import TASKS, write_model, write_tasks  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(cache))
        return write_tasks(tmp_path_factory.mktemp("tasks"))


def evaluated(model: str, folder: Path, tasks: Path, **options: Any) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(folder), "dtype": "float32"} | options.pop("model_args", {})
    names = options.pop("names", list(TASKS))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)  # those are thousands of files
    return lm_eval.simple_evaluate(
        model, arguments, names, device="cpu", task_manager=manager, bootstrap_iters=0, **options
    )


def answers(results: dict[str, Any]) -> dict[str, Any]:
    """What the model said to each item, by task."""
    samples = results["samples"]
    return {name: [s["resps"] for s in sorted(samples[name], key=lambda s: s["doc_id"])] for name in samples}


@pytest.fixture(scope="module")
def ours(folder: Path, tasks: Path) -> dict[str, Any]:
    return evaluated("gptfast", folder, tasks)


@pytest.fixture(scope="module")
def theirs(folder: Path, tasks: Path) -> dict[str, Any]:
    return evaluated("hf", folder, tasks)


def flat(value: Any) -> list[Any]:
    return [x for part in value for x in flat(part)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TASKS))
def test_every_answer_is_that_of_hf(ours: Any, theirs: Any, name: str):
    """Scores, whether they are greedy, and texts; contexts too long, empty, with blanks at their end, in other scripts."""
    found, expected = flat(answers(ours)[name]), flat(answers(theirs)[name])
    assert len(found) == len(expected) and len(expected) >= len(TASKS[name][0])
    for one, other in zip(found, expected, strict=True):
        # sums of up to 102 tokens of some -20 each, which hf adds in fp32
        assert one == (pytest.approx(other, abs=1e-4, rel=1e-6) if isinstance(other, float) else other)
    metrics = {key: value for key, value in theirs["results"][name].items() if isinstance(value, float)}
    assert metrics and {key: ours["results"][name][key] for key in metrics} == pytest.approx(metrics, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, "auto", "auto:2"])
def test_answers_are_equal_bit_for_bit_over_batch_sizes(ours: Any, folder: Path, tasks: Path, size: Any):
    assert answers(evaluated("gptfast", folder, tasks, batch_size=size)) == answers(ours)


@pytest.mark.slow
def test_formats_and_prefix_and_length(ours: Any, folder: Path, tasks: Path, capfd: pytest.CaptureFixture[str]):
    found = evaluated("gptfast", folder, tasks, model_args={"dtype": "int8"}, names=["own_choice", "own_read"])
    assert found["config"]["model_dtype"] == "int8"
    near = pytest.approx(ours["results"]["own_read"]["bits_per_byte,none"], rel=0.02)
    assert found["results"]["own_read"]["bits_per_byte,none"] == near != answers(ours)["own_read"]
    assert answers(found)["own_choice"] != answers(ours)["own_choice"]
    capfd.readouterr()
    arguments = {"prefix_token_id": 11, "max_length": 32}
    mine = evaluated("gptfast", folder, tasks, model_args=arguments, names=["own_cloze", "own_read"])
    assert "prefix token 11 ','; max_length 32" in capfd.readouterr().err
    other = evaluated("hf", folder, tasks, model_args=arguments, names=["own_cloze", "own_read"])
    for name in ("own_cloze", "own_read"):
        assert flat(answers(mine)[name]) == pytest.approx(flat(answers(other)[name]), abs=1e-4, rel=1e-6)
        assert flat(answers(mine)[name]) != flat(answers(ours)[name])


CHAT = (
    "{% for m in messages %}{% if m.role == 'system' and m.content != 'be kind' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ bos_token if loop.first }}[{{ m.role }}]{{ m.content PIPE trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module", params=["trims", "keeps"])
def pair(request: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[GPTFastLM, Any]:
    """Our model and that of `--model hf` with a tokenizer that puts a first token before a text, and a chat template that does."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    place = tmp_path_factory.mktemp("first")
    for file in folder.iterdir():
        (place / file.name).write_bytes(file.read_bytes())
    settings = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": True}))
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.chat_template = CHAT.replace("PIPE trim", "| trim" if request.param == "trims" else "")
    tokenizer.save_pretrained(place)
    return GPTFastLM(str(place), dtype="float32"), HFLM(str(place), device="cpu", dtype="float32")


def asked(model: Any, kind: str, *arguments: Any) -> Any:
    from lm_eval.api.instance import Instance

    request = Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("t", 0, 1))
    return getattr(model, kind)([request], disable_tqdm=True)[0]


@pytest.mark.parametrize(
    "text", ["A cat", "<|endoftext|>A cat", "<|endoftext|>", "A<|endoftext|>", " <|endoftext|>A", ""]
)
def test_a_first_token_is_not_put_before_itself(pair: tuple[GPTFastLM, Any], text: str):
    ours, theirs = pair
    assert ours.tok_encode(text) == theirs.tok_encode(text)
    near = {"abs": 1e-4, "rel": 1e-6}  # as in `test_every_answer_is_that_of_hf`
    for kind, arguments in (("loglikelihood", (text, " sat down")), ("loglikelihood_rolling", (text + " sat",))):
        found, expected = (flat([asked(model, kind, *arguments)]) for model in pair)
        assert found == pytest.approx(expected, **near), kind
    if text:  # hf cannot continue nothing
        options = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
        assert asked(ours, "generate_until", text, options) == asked(theirs, "generate_until", text, dict(options))


@pytest.mark.parametrize("system", ["be kind", "be quick"])
@pytest.mark.parametrize("last", [None, "The answer is", " the answer: ", ""])
def test_conversations_are_those_of_hf(pair: tuple[GPTFastLM, Any], system: str, last: str | None):
    """Also where the template refuses a system message, and where the last message is to be continued (`gen_prefix`)."""
    ours, theirs = pair
    chat = [{"role": "system", "content": system}, {"role": "user", "content": "How many? "}]
    if last is not None:
        chat.append({"role": "assistant", "content": last})
    text = ours.apply_chat_template(chat, add_generation_prompt=last is None)
    assert text == theirs.apply_chat_template(chat, add_generation_prompt=last is None)
    assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_what_is_too_long_is_counted(ours: Any):
    """One cloze of 94 tokens; rolling windows are cut, not truncated; one prompt of 83 tokens before 12 new ones."""
    assert ours["config"]["truncated_requests"] == {"loglikelihood": 1, "generate_until": 1}


def request(*args: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", {}, args, 0, ("own", 0, 1))


def test_items_that_cannot_be_scored_are_named(folder: Path):
    model = GPTFastLM(str(folder))
    with pytest.raises(ValueError, match="an item of own has an empty continuation after 'To be'"):
        model.loglikelihood([request("To be", "")])
    with pytest.raises(ValueError, match="the continuation 'f' is one token with the end of the context 'o'"):
        model.loglikelihood([request("o", "f")])
    with pytest.raises(ValueError, match="a continuation has 70 tokens and max_length is 64"):
        model.loglikelihood([request("a", " b" * 70)])
    with pytest.raises(ValueError, match="max_gen_toks is 256; expected 1 to 63"):
        model.generate_until([request("a", {"until": ["\n"]})])
    with pytest.raises(TypeError, match="unknown option 'colour'"):
        model.generate_until([request("a", {"until": [], "max_gen_toks": 4, "colour": 1})])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int7"}, "dtype is 'int7'; expected one of float32"),
        ({"max_length": 65}, "max_length is 65; expected.*64"),
        ({"prefix_token_id": 50257}, "prefix_token_id is 50257; expected"),
        ({"batch_size": "many"}, "batch_size is 'many'; expected a number"),
        ({"revision": "main"}, "unknown argument 'revision'; expected pretrained, dtype"),
        ({"device": "meta", "dtype": "int8"}, "dtype is 'int8' on meta; expected one of float32"),
        ({"adapter": "a", "peft": "b"}, "adapter is 'a' and peft is 'b', which mean the same"),
    ],
)
def test_arguments_that_are_refused(folder: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        GPTFastLM(str(folder), **arguments)


PAIRS = [("To be, or not", " to be"), ("", "To be"), ("One two ", "three"), ("a", " b" * 20), ("To be, or", " not")]


def test_an_adapter_of_peft(folder: Path, tmp_path: Path):
    """Scores and texts with adapter= are those of hf with peft=, and others than without."""
    peft = pytest.importorskip("peft")
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    torch.manual_seed(0)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config).save_pretrained(tmp_path)
    theirs = HFLM(pretrained=str(folder), peft=str(tmp_path), device="cpu", dtype="float32")
    plain, *ours = (
        GPTFastLM(str(folder), "float32", **{n: str(tmp_path) for n in names})
        for names in ((), ("adapter",), ("peft",))
    )
    pairs, writes = [request(*pair) for pair in PAIRS], [request("To be", {"until": ["e"], "max_gen_toks": 8})]
    scores, texts = theirs.loglikelihood(pairs, disable_tqdm=True), theirs.generate_until(writes, disable_tqdm=True)
    for model in ours:
        found = model.loglikelihood(pairs, disable_tqdm=True)
        assert flat(found) == pytest.approx(flat(scores), abs=1e-4, rel=1e-6)
        assert flat(found) != pytest.approx(flat(plain.loglikelihood(pairs, disable_tqdm=True)), abs=1e-2)
        assert model.generate_until(writes, disable_tqdm=True) == texts


def test_the_way_of_gpus(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Where there is no engine the network itself runs, in torch: here on the CPU."""
    from gptfast.evaluation import harness_arguments, harness_model

    here, packed = torch.device("cpu"), GPTFastLM(str(folder), "float32")
    monkeypatch.setattr(harness_model, "on_device", lambda gpt, *_: harness_arguments.in_torch(gpt, "float32", here))
    model = GPTFastLM(str(folder), "float32")
    assert isinstance(model._model, torch.nn.Module)
    pairs, writes = [request(*pair) for pair in PAIRS], [request("To be", {"until": ["e"], "max_gen_toks": 8})]
    expected = flat(packed.loglikelihood(pairs, disable_tqdm=True))
    assert flat(model.loglikelihood(pairs, disable_tqdm=True)) == pytest.approx(expected, abs=1e-4, rel=1e-6)
    assert model.generate_until(writes, disable_tqdm=True) == packed.generate_until(writes, disable_tqdm=True)
    rolling = [request("To be, or not to be. " * 20)]
    assert model.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(
        packed.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-4, rel=1e-6
    )


def test_contexts_that_share_a_beginning_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Forty tokens before four contexts, each with five continuations: no token of a context twice, no row of logits too many."""
    from gptfast import GPT
    from gptfast.engine.runner import EngineRunner

    packed = GPT.from_pretrained(folder).compile_for_inference("float32")
    pairs = [([*range(40), 50 + n, 9], [60 + k] * (k + 1)) for n in range(4) for k in range(5)]
    alone = [ContinuationScorer(packed, most=1).score([pair])[0] for pair in pairs]
    read, extend = [], EngineRunner.extend

    def counted(self: Any, slots: Any, tokens: Any, last_only: bool = True) -> Any:
        read.append((sum(map(len, tokens)), len(slots) if last_only else sum(map(len, tokens))))
        return extend(self, slots, tokens, last_only)

    monkeypatch.setattr(EngineRunner, "extend", counted)
    assert ContinuationScorer(packed, most=64).score(pairs) == alone
    assert sum(tokens for tokens, _ in read) == 40 + 4 * 2 + 4 * (0 + 1 + 2 + 3 + 4)
    assert sum(rows for _, rows in read) == 1 + 4 + 4 * (0 + 1 + 2 + 3 + 4)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command in this process; without the package's own tasks, which are thousands of files."""
    import lm_eval.tasks

    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["harness", "--model", "gptfast", *arguments])
        return harness.main()

    return run


def test_the_command_with_a_cache(command: Any, folder: Path, tasks: Path, tmp_path: Path, capfd: Any):
    arguments = ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "own_choice,own_write"]
    arguments += ["--include_path", str(tasks), "--use_cache", str(tmp_path / "cache"), "--batch_size", "4"]
    tables = []
    for n in range(2):
        out = tmp_path / f"out{n}"
        assert command(*arguments, "--output_path", str(out)) == 0
        shown = capfd.readouterr()
        assert "prefix token 50256 '<|endoftext|>'; max_length 64" in shown.err
        assert ("1 of 4 generate_until requests were too long" in shown.err) == (n == 0)  # the second run asks nothing
        assert shown.err.count("Requests remaining: 0") == 2 * n
        tables.append([line for line in shown.out.splitlines() if line.startswith("|")])
        (file,) = out.rglob("results*.json")
        assert json.loads(file.read_text())["config"]["model_dtype"] == "float32"
    assert tables[0] == tables[1] and any("own_choice" in line for line in tables[0])


def test_the_command_says_what_is_wrong_in_a_line(command: Any, tasks: Path, capfd: Any):
    assert (
        command("--tasks", "own_read", "--include_path", str(tasks), "--model_args", "pretrained=nowhere/at/all") == 1
    )
    said = capfd.readouterr().err.splitlines()  # before: pytest's complaints about the streams that it has closed
    assert said[-2].startswith("error: nowhere/at/all does not exist; expected a checkpoint folder")
    assert said[-1] == "(GPTFAST_DEBUG=1 shows where it was raised)"


@pytest.mark.slow
def test_the_module_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "gptfast.evaluation.harness", "run", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--include_path" in done.stdout


def test_versions_outside_the_tested_range(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness.metadata, "version", lambda name: "0.4.9.1")
    with pytest.raises(
        ImportError, match=r"lm-eval 0.4.9.1 is older than 0.4.13, the oldest that this was tested with"
    ):
        harness.check_version()
    monkeypatch.setattr(harness.metadata, "version", lambda name: "0.4.14")
    with pytest.warns(UserWarning, match=r"lm-eval 0.4.14 is newer than 0.4.13"):
        harness.check_version()

    def missing(name: str) -> str:
        raise harness.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness.metadata, "version", missing)
    with pytest.raises(ImportError, match="lm-eval is not installed; install it with pip install"):
        harness.check_version()


def test_ctrl_c_is_no_traceback(command: Any, monkeypatch: Any, capfd: Any):
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", interrupted)
    assert command() == 130 and capfd.readouterr().err.endswith("interrupted\n")


def test_nan_is_an_error(folder: Path):
    from gptfast import GPT

    gpt = GPT.from_pretrained(folder)
    gpt.ln_f.weight.data[0] = torch.nan
    with pytest.raises(RuntimeError, match="nan"):
        ContinuationScorer(gpt)([1, 2], [[3]])
