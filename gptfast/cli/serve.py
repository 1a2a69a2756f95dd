"""gptfast serve: an HTTP server with OpenAI's protocol, and a page to play with."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from gptfast._options import option
from gptfast.cli._load import MODEL_HELP, QUANTIZE_HELP, SPECIAL_TOKENS_HELP, TOKENIZER_HELP, check_batch_size, load
from gptfast.cli._options import Options, takes
from gptfast.serving.hosts import hosts_of, is_loopback

KEY_VARIABLE = "GPTFAST_API_KEY"


@dataclass(frozen=True)
class ServeOptions:
    """The options of `gptfast serve`."""

    model: str = option(MISSING, MODEL_HELP)
    host: str = option("127.0.0.1", "The address to listen on; the default can be reached from this machine only.")
    port: int = option(8000, "The port to listen on; 0: any free port.")
    name: str | None = option(None, "The model's name for clients.", words="that of the folder or id")
    api_key: str | None = option(
        None,
        f"The bearer token that clients must send; safer in the environment variable {KEY_VARIABLE}, which other users cannot "
        "see.",
    )
    no_auth: bool = option(False, "Listen beyond this machine without a key.")
    cors_origin: list[str] | None = option(
        None,
        "Allow web pages of this origin, such as https://example.com; may be given several times. *: all pages; none: not "
        "even pages of this machine.",
        words="pages of this machine",
    )
    allowed_host: list[str] | None = option(
        None,
        "Answer requests that were sent to this name, such as gpu.example.org of a proxy; may be given several times. "
        "*.example.org: every name below it; *: every name. Names of this machine are always answered.",
        words="every name; where --host is an address of this machine alone: that one",
    )
    adapter: list[str] | None = option(
        None,
        "NAME=FOLDER: also serve the model with this adapter (see GPT.save_adapter, or peft's), for requests whose model is "
        "MODEL:NAME; may be given several times. All share one copy of the model and run in one batch.",
    )
    tokenizer: str | None = option(None, TOKENIZER_HELP, words="the checkpoint's own")
    special_tokens: bool = option(True, SPECIAL_TOKENS_HELP)
    quantize: str | None = option(None, f"{QUANTIZE_HELP}.")
    batch_size: int = option(16, "How many texts are generated at a time.")
    max_queue: int = option(64, "How many more texts may wait; further requests are answered with 429.")
    max_connections: int | None = option(
        None,
        "Clients that may be connected at a time; further ones are answered with 503.",
        words="1024 or four per text, within the limit of open files (ulimit -n)",
    )
    timeout: float = option(600.0, "Seconds in which an answer must be complete.")


@takes(Options(ServeOptions))
def serve(given: dict[str, Any]) -> None:
    """Serve completions and chats to OpenAI clients, and a page to play with at /.

    [bold]Examples[/]

      [cyan]gptfast serve --model runs/bard/best[/]

      [cyan]curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "best", "prompt": "ROMEO:", "max_tokens": 50}'[/]

      With adapters, "model": "best" and "model": "best:poems":

      [cyan]gptfast serve --model runs/bard/best --quantize int8 --adapter poems=runs/poems --adapter plays=runs/plays[/]

      A conversation, written by the tokenizer's chat template or, without one, as a plain transcript:

      [cyan]curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{"model": "best", "messages": [{"role": "user", "content": "Who are you?"}]}'[/]

      In Python: [cyan]openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="…").completions.create(model="best", prompt="ROMEO:")[/]
    """
    options = ServeOptions(**given)
    key = options.api_key or os.environ.get(KEY_VARIABLE) or None
    _check(options, key)
    hosts, origins = hosts_of(options.host, options.allowed_host or []), options.cors_origin or []
    adapters = _adapters(options.adapter or [])
    try:
        from gptfast.serving.app import Limits, create_app
        from gptfast.serving.connections import choose_connections
        from gptfast.serving.cors import check_origins
        from gptfast.serving.server import bind, run
    except ImportError as error:
        raise ImportError(f"serve: {error.name} is not installed; pip install 'gptfast-kernels[serve]'") from None
    check_origins(origins)
    connections = choose_connections(options.max_connections, options.batch_size + options.max_queue)
    with bind(options.host, options.port) as bound:
        model, tokenizer = load(options.model, options.quantize, options.tokenizer, adapters)
        limits = Limits(
            max_rows=options.batch_size,
            max_queue=options.max_queue,
            seconds=options.timeout,
            max_connections=connections,
            special_tokens=options.special_tokens,
        )
        name = options.name or _name(options.model)
        run(create_app(model, tokenizer, name, limits, key, origins, hosts), bound)


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).exists() else model


def _adapters(given: list[str]) -> dict[str, str]:
    """Folders by name."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ValueError(f"serve: `adapter` is {text!r}; expected NAME=FOLDER")
        if name in found:
            raise ValueError(f"serve: `adapter` names {name!r} twice; each needs a name of its own")
        found[name] = folder
    return found


def _check(options: ServeOptions, key: str | None) -> None:
    if not 0 <= options.port < 65536:
        raise ValueError(f"serve: `port` is {options.port}; expected 0 to 65535 (0: any free one)")
    check_batch_size("serve", options.batch_size)
    if options.max_queue < 0:
        raise ValueError(f"serve: `max_queue` is {options.max_queue}; expected at least 0")
    if not options.timeout > 0:
        raise ValueError(f"serve: `timeout` is {options.timeout}; expected seconds > 0")
    if key is None and not options.no_auth and not is_loopback(options.host):
        raise ValueError(
            f"serve: `host` {options.host} can be reached from other machines, and there is no API key; set {KEY_VARIABLE}, "
            "or give `no_auth`"
        )
