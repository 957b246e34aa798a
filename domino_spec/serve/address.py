"""Where a server listens, and who may reach it."""

from __future__ import annotations

import ipaddress
import re
import socket

from domino_spec.settings import UserError, found

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)


def check_host(host: str) -> None:
    """Refuse what is neither an address nor written as a name.

    Raises:
        UserError: it is neither.
    """
    try:
        ipaddress.ip_address(host)
        return
    except ValueError:
        pass
    try:
        labels = host.encode("idna").decode("ascii").removesuffix(".").split(".")
    except UnicodeError:
        labels = [""]
    if len(host) > 253 or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        raise UserError(f"--host: expected an address or a host name, such as 127.0.0.1, found {found(host)}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_api_key(host: str, api_key: str | None) -> None:
    """Refuse an address that others reach without a key.

    Raises:
        UserError: there is no API key.
    """
    if not is_loopback(host) and not api_key:
        raise UserError(
            f"{host} is reached from other machines: give --api-key or DOMINO_SPEC_API_KEY, or leave out --host"
        )


def bind(host: str, port: int, api_key: str | None) -> socket.socket:
    """A socket that nobody can connect to yet; port 0 takes a free one.

    Raises:
        UserError: the address cannot be had, or others reach it and there is no API key.
    """
    check_host(host)
    check_api_key(host, api_key)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        where = f"{host} port {port}" if port else host
        raise UserError(f"cannot listen on {where}: {reason}; choose another --port or --host") from None
    return bound


def url(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
