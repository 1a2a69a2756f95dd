"""The names under which a server is asked: what browsers and other clients send as Host."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

ANY = "*"
_LABEL = "[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?"
_NAME = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]*)(:\d{0,5})?")


def is_loopback(host: str) -> bool:
    """Whether a name or an address (without brackets) leads to this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_of(host: str, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The names that a server answers to, besides those of this machine; ("*",): all names.

    Args:
        host: the address that it listens on. One that others can reach, with no names given, answers to every name.
        names: more names, from the operator: host names, addresses, "*.example.org" for all names below it, or "*".
    Raises:
        ValueError: one of `names` is none of these.
    """
    plain = [_plain(name) for name in names]
    if ANY in names or not (names or is_loopback(host)):
        return (ANY,)
    return (host.lower(), *plain)


def is_name_of(hosts: Sequence[str], header: str) -> bool:
    """Whether a header Host is one of `hosts`, as `hosts_of` returns them, or of this machine; ports do not matter."""
    name = without_port(header)
    return any(own in (ANY, name) or (own.startswith("*.") and name.endswith(own[1:])) for own in hosts) or (
        is_loopback(name)
    )


def without_port(header: str) -> str:
    """The name of a header Host in small letters, or its address without brackets; "" where it is neither."""
    found = _HOST.fullmatch(header.strip().lower())
    return found[1].strip("[]").removesuffix(".") if found else ""


def _plain(name: str) -> str:
    """A name in small letters, or an address as browsers write it, without brackets."""
    if name == ANY or _NAME.fullmatch(name.lower()):
        return name.lower()
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        raise ValueError(
            f"serve: `allowed_host` is {name!r}; expected a name without http:// and port, such as gpu.example.org or "
            "*.example.org, an address, or * for every name"
        ) from None
