"""gptfast serve: an HTTP server with the OpenAI completions protocol."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import Annotated

import typer

from gptfast.cli._load import MODEL_HELP, QUANTIZE_HELP, SPECIAL_TOKENS_HELP, TOKENIZER_HELP, check_batch_size, load

KEY_VARIABLE = "GPTFAST_API_KEY"


def serve(
    model: Annotated[str, typer.Option(help=MODEL_HELP)],
    host: Annotated[
        str, typer.Option(help="The address to listen on; the default can be reached from this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen on; 0: any free port.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients.", show_default="of the folder or id")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help=f"The bearer token that clients must send; safer in the environment variable {KEY_VARIABLE}, which other users cannot see."
        ),
    ] = None,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Listen beyond this machine without a key.")] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Allow web pages of this origin, such as https://example.com; may be given several times. *: all pages; "
            "none: not even pages of this machine.",
            show_default="pages of this machine",
        ),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help=TOKENIZER_HELP, show_default="the checkpoint's own")] = None,
    special_tokens: Annotated[
        bool,
        typer.Option(help=SPECIAL_TOKENS_HELP),
    ] = True,
    quantize: Annotated[
        str | None,
        typer.Option(help=f"{QUANTIZE_HELP}."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="How many texts are generated at a time.")] = 16,
    max_queue: Annotated[
        int, typer.Option(help="How many more texts may wait; further requests are answered with 429.")
    ] = 64,
    max_connections: Annotated[
        int | None,
        typer.Option(
            help="Clients that may be connected at a time; further ones are answered with 503.",
            show_default="1024, or four per text, as far as `ulimit -n` goes",
        ),
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds in which an answer must be complete.")] = 600.0,
) -> None:
    """Serve completions to OpenAI clients.

    [bold]Examples[/]

      [cyan]gptfast serve --model runs/bard/best[/]

      [cyan]curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "best", "prompt": "ROMEO:", "max_tokens": 50}'[/]

      In Python: [cyan]openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="…").completions.create(model="best", prompt="ROMEO:")[/]
    """
    key = api_key or os.environ.get(KEY_VARIABLE) or None
    _check(host, port, key, no_auth, batch_size, max_queue, timeout)
    try:
        from gptfast.serving.app import Limits, create_app
        from gptfast.serving.connections import choose_connections
        from gptfast.serving.cors import check_origins
        from gptfast.serving.server import bind, run
    except ImportError as error:
        raise ImportError(f"serve: {error.name} is not installed; pip install 'gptfast-kernels[serve]'") from None
    origins = cors_origin or []
    check_origins(origins)
    connections = choose_connections(max_connections, batch_size + max_queue)
    with bind(host, port) as bound:
        writer, encoding = load(model, quantize, tokenizer)
        limits = Limits(
            max_rows=batch_size,
            max_queue=max_queue,
            seconds=timeout,
            max_connections=connections,
            special_tokens=special_tokens,
        )
        run(create_app(writer, encoding, name or _name(model), limits, key, origins), bound)


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _check(
    host: str, port: int, key: str | None, no_auth: bool, batch_size: int, max_queue: int, timeout: float
) -> None:
    if not 0 <= port < 65536:
        raise ValueError(f"serve: --port is {port}; expected 0 to 65535 (0 takes any free one)")
    check_batch_size("serve", batch_size)
    if max_queue < 0:
        raise ValueError(f"serve: --max-queue is {max_queue}; expected at least 0")
    if not timeout > 0:
        raise ValueError(f"serve: --timeout is {timeout}; expected seconds > 0")
    if key is None and not no_auth and not _is_loopback(host):
        raise ValueError(
            f"serve: --host {host} can be reached from other machines, and there is no API key; set {KEY_VARIABLE}, or "
            "give --no-auth"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
