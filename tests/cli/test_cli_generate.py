"""gptfast generate, as a user types it: what it prints, and one clear line for what is wrong."""

from __future__ import annotations

import io
import re
import subprocess
import sys

import pytest
import torch

from gptfast import GPT
from gptfast.backend import has_cpu_ops
from gptfast.cli import app
from gptfast.finetuning import LoraConfig
from gptfast.generation import Step
from gptfast.tokenizer import CharTokenizer, GPT2Tokenizer
from tests.support.command import BLOCK, LETTERS, save_model


@pytest.fixture(scope="module")
def chars(tmp_path_factory):
    """(folder, model, tokenizer) of a small character model."""
    path, tokenizer = tmp_path_factory.mktemp("chars"), CharTokenizer.train(LETTERS)
    return str(path), save_model(path, tokenizer), tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The same of one with GPT-2's tokenizer, which has an end token and splits characters."""
    path, tokenizer = tmp_path_factory.mktemp("bpe"), GPT2Tokenizer()
    return str(path), save_model(path, tokenizer), tokenizer


def test_streams_what_generate_returns(run, chars):
    path, model, tokenizer = chars
    code, out, err = run("--model", path, "--prompt", "ROMEO:", "--max-new-tokens", 20, "--seed", 3, "--top-k", 9)
    ids = tokenizer.encode("ROMEO:")
    expected = model.generate([ids], max_new_tokens=20, seed=3, top_k=9, temperature=0.8)[0]
    assert (code, out) == (0, tokenizer.decode(expected) + "\n")
    assert re.fullmatch(r"20 tokens in \d+\.\d s, \d+ tokens/s\n", err)


@pytest.mark.parametrize("quantize", [[], ["--quantize", "int8"]])
def test_an_adapter_is_used(run, chars, tmp_path, quantize):
    path, _, tokenizer = chars
    gpt = GPT.from_pretrained(path).eval()
    torch.manual_seed(0)
    gpt.add_adapter(LoraConfig(r=4, lora_alpha=64, init_lora_weights=False))
    gpt.save_adapter(tmp_path / "adapter")
    given = ("--model", path, "--prompt", "ROMEO:", "--max-new-tokens", 20, "--temperature", 0, *quantize)
    code, out, _ = run(*given, "--adapter", tmp_path / "adapter")
    model = gpt.compile_for_inference("int8") if quantize else gpt
    expected = model.generate([tokenizer.encode("ROMEO:")], max_new_tokens=20)[0]
    assert (code, out) == (0, tokenizer.decode(expected) + "\n")
    assert run(*given)[1] != out
    code, _, err = run(*given, "--adapter", tmp_path / "nowhere")
    assert code == 1 and "nowhere holds no adapter_config.json" in err


def test_text_arrives_token_by_token_in_whole_characters(run, bpe, monkeypatch):
    """What is on the screen before each step is computed."""
    path, _, tokenizer = bpe
    tokens, screen, seen = tokenizer.encode(" is 🤗, né"), [], []

    def stream(model, ids, **options):
        for token in tokens:
            seen.append("".join(screen))
            yield Step(tokens=[token], logprobs=[], top=[])

    def write(text, end="\n", file=None, flush=False):
        assert flush or file is sys.stderr or end == "\n"
        screen.append(text + end)

    monkeypatch.setattr("gptfast.generation.stream", stream)
    monkeypatch.setattr("builtins.print", write)
    run("--model", path, "--prompt", "This")
    shown = ["This" + tokenizer.decode(tokens[:n]).rstrip("\ufffd") for n in range(len(tokens))]
    assert len(tokens) > 6 and [text.rstrip(" ") for text in seen] == [text.rstrip(" ") for text in shown]


def test_several_sequences_come_under_headings(run, chars):
    path, model, tokenizer = chars
    prompts = ["a", "ROMEO: so"]
    args = ("--model", path, "--prompt", prompts[0], "--prompt", prompts[1], "--num-return-sequences", 2)
    code, out, err = run(*args, "--max-new-tokens", 7)
    ids = [tokenizer.encode(text) for text in prompts]
    rows = model.generate(ids, max_new_tokens=7, temperature=0.8, seed=0, num_return_sequences=2)
    parts = re.split(r"---- prompt (\d), continuation (\d) -+\n", out)[1:]
    assert code == 0 and list(zip(parts[::3], parts[1::3], strict=True)) == [
        ("1", "1"),
        ("1", "2"),
        ("2", "1"),
        ("2", "2"),
    ]
    assert parts[2::3] == [tokenizer.decode(row) + "\n" for row in rows] and err.startswith("28 tokens")


def test_beams(run, chars):
    path, model, tokenizer = chars
    code, out, _ = run("--model", path, "--prompt", "ab", "--num-beams", 4, "--length-penalty", 0.5)
    best = model.generate([tokenizer.encode("ab")], num_beams=4, length_penalty=0.5, max_new_tokens=BLOCK - 2)[0]
    assert code == 0 and out.split("\n", 1)[1] == tokenizer.decode(best) + "\n"


def test_strategies_reach_the_model(run, chars):
    path, model, tokenizer = chars
    ids = tokenizer.encode("ROMEO:")
    flags = ("--min-p", 0.05, "--repetition-penalty", 1.3, "--no-repeat-ngram-size", 2, "--stop", "z", "--stop", "RO")
    flags += ("--presence-penalty", 0.5, "--frequency-penalty", -0.25)
    _, out, _ = run("--model", path, "--prompt", "ROMEO:", "--overflow", "slide", "--max-new-tokens", 60, *flags)
    options = {"min_p": 0.05, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "stop_strings": ["z", "RO"]}
    options |= {"presence_penalty": 0.5, "frequency_penalty": -0.25}
    options |= {"overflow": "slide", "max_new_tokens": 60, "temperature": 0.8, "seed": 0, "tokenizer": tokenizer}
    assert out == tokenizer.decode(model.generate([ids], **options)[0]) + "\n"
    for guess in (("--prompt-lookup-num-tokens", 3), ("--assistant-model", path)):
        guessed = run(
            "--model", path, "--prompt", "ROMEO:", "--overflow", "slide", "--max-new-tokens", 60, *flags, *guess
        )
        assert guessed[1] == out
    beams = {"num_beams": 3, "do_sample": True, "temperature": 0.8, "seed": 0, "max_new_tokens": 9}
    _, out, _ = run("--model", path, "--prompt", "ab", "--num-beams", 3, "--do-sample", "--max-new-tokens", 9)
    assert out.split("\n", 1)[1] == tokenizer.decode(model.generate([tokenizer.encode("ab")], **beams)[0]) + "\n"


def test_the_default_length_fits_the_model_and_an_explicit_one_must(run, chars):
    path = chars[0]
    code, out, err = run("--model", path, "--prompt", "ROMEO:")
    assert code == 0 and len(out) == BLOCK + 1 and err.startswith(f"{BLOCK - 6} tokens")
    code, out, err = run("--model", path, "--prompt", "ROMEO:", "--max-new-tokens", 35)
    assert (code, out) == (1, "")
    assert "6 tokens and --max-new-tokens is 35, together 41, but block_size is 40; shorten the prompt to 5" in err
    code, out, err = run("--model", path, "--prompt", "a" * BLOCK)
    assert code == 1 and "shorten the prompt to 39 or fewer" in err


@pytest.mark.parametrize("source", ["file", "stdin"])
def test_prompt_from_a_file_or_standard_input(run, chars, tmp_path, source):
    path = chars[0]
    file = tmp_path / "prompt.txt"
    file.write_text("romeo:\n\n", encoding="utf-8")  # one newline is the editor's, the other the user's
    args = ("--model", path, "--max-new-tokens", 3)
    expected = run(*args, "--prompt", "romeo:\n")
    got = run(*args, "--prompt-file", file) if source == "file" else run(*args, stdin=b"romeo:\n\n")
    assert got[:2] == expected[:2] and got[1].startswith("romeo:\n")


def test_a_new_document_begins_with_the_end_token(run, bpe):
    path, model, tokenizer = bpe
    code, out, _ = run("--model", path, "--prompt", "<|endoftext|>", "--max-new-tokens", 4)
    options = {"max_new_tokens": 4, "temperature": 0.8, "seed": 0}
    row = model.generate([[tokenizer.eos_id]], eos_token_id=tokenizer.eos_id, **options)[0]
    text = tokenizer.decode([token for token in row if token != tokenizer.eos_id])
    assert (code, out) == (0, f"<|endoftext|>{text}\n")


def test_the_end_token_ends_the_text_and_is_not_shown(run, tmp_path):
    tokenizer = GPT2Tokenizer()
    model = save_model(tmp_path, tokenizer)
    with torch.no_grad():  # whatever was read, the end is next
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1.0)
        model.wte.weight[tokenizer.eos_id] = 9.0
    model.save_pretrained(tmp_path)
    for more in ((), ("--num-return-sequences", 2), ("--show-probabilities",)):
        code, out, err = run("--model", tmp_path, "--prompt", "Hello", "--temperature", 0.1, *more)
        assert code == 0 and out.endswith("Hello\n")
        assert err.startswith("2 tokens" if "2" in map(str, more) else "1 tokens")


def test_probabilities_are_shown_step_by_step(run, chars):
    path, model, tokenizer = chars
    args = ("--model", path, "--prompt", "ROMEO:", "--max-new-tokens", 3, "--temperature", 0, "--show-probabilities")
    code, out, _ = run(*args)
    row = model.generate([tokenizer.encode("ROMEO:")], max_new_tokens=3, temperature=0)[0]
    with torch.no_grad():
        probs = model(torch.tensor([row[:6]]))[0, -1].softmax(-1)
    best = probs.max().item()
    tables = re.split(r"(?m)^\d: …", out)[1:]
    assert code == 0 and len(tables) == 3 and out.endswith(tokenizer.decode(row) + "\n")
    first = tables[0].splitlines()
    assert first[0].startswith("'ROMEO:'") and first[2].split()[-1] == "drawn"  # greedy takes the first of the list
    token = repr(tokenizer.decode([row[6]]))
    assert re.match(rf" *{re.escape(token)} +{best:.1%} +█{{{round(40 * best)}}} ", first[2])
    assert len(first) == 2 + 8  # title, header and eight tokens


def test_parts_of_characters_are_shown_as_bytes(bpe):
    from gptfast.tokenizer import token_text

    tokenizer = bpe[2]
    assert [token_text(tokenizer, token) for token in tokenizer.encode("🤗")] == [b"\xf0\x9f", b"\xa4", b"\x97"]
    assert token_text(tokenizer, tokenizer.encode(" the")[0]) == " the"


def test_a_token_outside_the_shown_ones_is_named(run, chars):
    code, out, _ = run("--model", chars[0], "--prompt", "a", "--temperature", 50, "--show-probabilities")
    assert code == 0 and "less likely than these" in out


@pytest.mark.slow
def test_a_hub_id_brings_its_tokenizer(chars, tmp_path):
    """Through a hub cache that holds the model already, without a connection."""
    pytest.importorskip("huggingface_hub")
    cache = tmp_path / "hub" / "models--somebody--chars"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0123abc")
    (cache / "snapshots").mkdir()
    (cache / "snapshots" / "0123abc").symlink_to(chars[0])
    code = "import sys, os; from gptfast.cli import main; main()"
    args = ["generate", "--model", "somebody/chars", "--prompt", "ab", "--max-new-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.startswith("ab"), done.stderr


@pytest.mark.parametrize(
    ("args", "stdin", "match"),
    [
        (["--prompt", ""], b"", "the prompt is empty; give at least one character"),
        ([], b"", "the prompt is empty"),
        ([], b"\n", "the prompt is empty"),
        ([], b"a\xff", r"standard input is not UTF-8 \(.*byte 0xff in position 1"),
        (["--prompt", "a", "--prompt-file", "x"], b"", "--prompt and --prompt-file were both given"),
        (["--prompt-file", "/nowhere/x.txt"], b"", "cannot read /nowhere/x.txt: No such file"),
        (["--prompt", "€"], b"", "'€' .* is not among the"),
        (["--prompt", "a", "--temperature", "nan"], b"", "--temperature is nan; expected a finite number"),
        (["--prompt", "a", "--temperature", "-1"], b"", "--temperature is -1.0; expected a number >= 0"),
        (["--prompt", "a", "--top-p", "0"], b"", "--top-p is 0.0; expected 0 < --top-p <= 1"),
        (["--prompt", "a", "--top-k", "-2"], b"", "--top-k is -2; expected at least 0"),
        (["--prompt", "a", "--seed", "-1"], b"", "--seed is -1; expected"),
        (["--prompt", "a", "--max-new-tokens", "0"], b"", "--max-new-tokens is 0; expected at least 1"),
        (["--prompt", "a", "--num-beams", "0"], b"", "--num-beams is 0; expected at least 1"),
        (["--prompt", "a", "--num-return-sequences", "0"], b"", "--num-return-sequences is 0; expected at least 1"),
        (
            ["--prompt", "a", "--num-beams", "2", "--num-return-sequences", "3"],
            b"",
            "--num-return-sequences is 3 but --num-beams is 2",
        ),
        (
            ["--prompt", "a", "--num-beams", "2", "--temperature", "0.5", "--top-p", "0.9"],
            b"",
            "--temperature and --top-p with --num-beams 2; beam search draws nothing",
        ),
        (["--prompt", "a", "--do-sample", "--temperature", "0"], b"", "--do-sample with --temperature 0"),
        (["--prompt", "a", "--overflow", "wrap"], b"", "--overflow is 'wrap'; expected 'error' or 'slide'"),
        (["--input", "x"], b"", "--input and --output go together; give both, or neither"),
        (["--output", "x"], b"", "--input and --output go together; give both, or neither"),
        (["--input", "x", "--output", "y", "--prompt", "a"], b"", "generate: --input with --prompt, --prompt-file"),
        (["--input", "x", "--output", "y", "--batch-size", "0"], b"", "--batch-size is 0; expected 1 to 65536"),
        (["--input", "/nowhere/x", "--output", "y"], b"", "cannot read /nowhere/x"),
        (["--prompt", "a", "--length-penalty", "2"], b"", "--length-penalty ranks beams, but there is one"),
        (
            ["--prompt", "a", "--num-beams", "2", "--length-penalty", "1e9"],
            b"",
            "--length-penalty is 1000000000.0; 39 new tokens to this power is beyond",
        ),
        (["--prompt", "a", "--num-beams", "2", "--show-probabilities"], b"", "shows one sequence; give one prompt"),
        (["--prompt", "a", "--prompt", "b", "--show-probabilities"], b"", "shows one sequence; give one prompt"),
    ],
)
def test_errors_are_one_line(run, chars, args, stdin, match):
    code, out, err = run("--model", chars[0], *args, stdin=stdin)
    assert (code, out) == (1, "")
    first, rest = err.split("\n", 1)
    assert re.match(f"error: .*{match}", first) and rest == "(GPTFAST_DEBUG=1 shows where it was raised)\n"


def test_a_terminal_without_a_prompt_is_not_waited_for(chars, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    with pytest.raises(ValueError, match='no prompt; give one with --prompt "…", --prompt-file, or on standard input'):
        app(["generate", "--model", chars[0]], standalone_mode=False)


def test_errors_of_the_model_folder(run, chars, tmp_path):
    code, _, err = run("--model", tmp_path / "nowhere", "--prompt", "a")
    assert code == 1 and "nowhere does not exist; expected a checkpoint folder with config.json" in err
    chars[1].save_pretrained(tmp_path)
    code, _, err = run("--model", tmp_path, "--prompt", "a")
    assert code == 1 and "no tokenizer in" in err


def test_a_tokenizer_of_another_model_is_noticed(run, chars, tmp_path):
    chars[1].save_pretrained(tmp_path)
    CharTokenizer.train(LETTERS + "0123456789").save(tmp_path)
    code, out, err = run("--model", tmp_path, "--prompt", "z")
    assert (code, out) == (1, "") and "was the text encoded with another tokenizer?" in err


def test_help_teaches(run):
    code, out, _ = run("--help")
    assert code == 0 and out.count("gptfast generate --model runs/bard/best") == 6
    assert "--show-probabilities" in out and "200, or fewer" in " ".join(out.replace("│", " ").split())


@pytest.mark.skipif(not has_cpu_ops, reason="this install has no compiled part")
@pytest.mark.parametrize("quantize", ["fp32", "bf16", "int8", "int4", "nf4"])
def test_quantize(run, chars, quantize):
    """The engine's text; in fp32 it is the model's."""
    path, model, tokenizer = chars
    code, out, _ = run("--model", path, "--prompt", "ROMEO", "--temperature", 0, "--quantize", quantize)
    ids = model.compile_for_inference(quantize).generate(
        [tokenizer.encode("ROMEO")], temperature=0.0, max_new_tokens=BLOCK - 5
    )
    assert code == 0 and tokenizer.decode(ids[0]) in out
    if quantize == "fp32":
        assert ids == model.generate([tokenizer.encode("ROMEO")], temperature=0.0, max_new_tokens=BLOCK - 5)


def test_unknown_quantize(run, chars):
    code, _, err = run("--model", chars[0], "--prompt", "ROMEO", "--quantize", "int3")
    assert code == 1 and "--quantize is 'int3'; expected one of int8, int6, q4, int4, nf4, mxfp4, bf16 or fp32" in err
