"""Where a server listens, and who may reach it."""

from __future__ import annotations

import ipaddress
import socket

from domino_spec.config import UserError


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
    check_api_key(host, api_key)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; choose another --port or --host") from None
    return bound


def url(bound: socket.socket) -> str:
    """Where clients find it."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
