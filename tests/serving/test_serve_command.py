"""The command gptfast serve: that it serves, and one clear line for what is wrong."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from tests.support.command import save_model
from tests.support.serving_app import BLOCK, httpx, new_text, openai


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [[], ["--quantize", "fp32"]], ids=["torch", "engine"])
def test_the_command_serves_until_sigterm(quantize, tmp_path, tokenizer):
    model = save_model(tmp_path / "bard", tokenizer, BLOCK)
    code = "import sys; from gptfast.cli import main; main()"
    args = [sys.executable, "-c", code, "serve", "--model", str(tmp_path / "bard"), "--port", "0", *quantize]
    args += ["--allowed-host", "gpu.example.org"]
    env = {**os.environ, "GPTFAST_API_KEY": "sesame"}
    with subprocess.Popen(args, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"running on (http://127.0.0.1:\d+)", line):
                break
        with openai.OpenAI(base_url=found[1] + "/v1", api_key="sesame") as client:
            got = client.completions.create(model="bard", prompt="ROMEO:", max_tokens=7, temperature=0)
        assert [got.choices[0].text] == new_text(model, tokenizer, "ROMEO:", max_new_tokens=7, temperature=0)
        named = [
            httpx.get(found[1], headers={"Host": host}).status_code for host in ("gpu.example.org", "evil.example")
        ]
        assert named == [200, 403]
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (
            ["--host", "0.0.0.0"],
            "--host 0.0.0.0 can be reached from other machines, and there is no API key; set GPTFAST",
        ),
        (["--host", "example.org"], "--host example.org can be reached from other machines"),
        (["--port", "70000"], "--port is 70000; expected 0 to 65535"),
        (["--batch-size", "0"], "--batch-size is 0; expected 1 to 65536"),
        (["--batch-size", "1000000000"], "--batch-size is 1000000000; expected 1 to 65536"),
        (["--max-queue", "-1"], "--max-queue is -1; expected at least 0"),
        (["--max-connections", "0"], "--max-connections is 0; expected 1 to "),
        (["--max-connections", "1000000000"], "the limit of open files - give fewer, or raise"),
        (["--timeout", "nan"], "--timeout is nan; expected seconds > 0"),
        (["--port", "0"], "nowhere does not exist"),
        (["--host", "0.0.0.0", "--no-auth", "--port", "0"], "nowhere does not exist"),
        (
            ["--host", "192.0.2.1", "--no-auth", "--port", "0"],
            "serve: cannot listen on 192.0.2.1, port 0: Cannot assign requested address; choose another --port, or a --host",
        ),
    ],
)
def test_errors_of_the_command(monkeypatch, capsys, args, match):
    from gptfast.cli import main

    monkeypatch.delenv("GPTFAST_API_KEY", raising=False)
    monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", "./nowhere", *args])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1 and match in capsys.readouterr().err


def test_a_port_in_use_is_reported_before_a_model_is_loaded(monkeypatch, capsys):
    from gptfast.cli import main

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", "./nowhere", "--port", port])
        with pytest.raises(SystemExit) as stop:
            main()
    assert stop.value.code == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_without_the_extra_the_command_names_what_to_install(monkeypatch, capsys):
    from gptfast.cli import main

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "gptfast.serving.server")
    monkeypatch.setattr(sys, "argv", ["gptfast", "serve", "--model", "x"])
    with pytest.raises(SystemExit):
        main()
    assert "serve: uvicorn is not installed; pip install 'gptfast-kernels[serve]'" in capsys.readouterr().err
