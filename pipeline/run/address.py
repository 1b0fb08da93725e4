"""The address of a Ray cluster as people give it: what it must be, and who answers there."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from depthvar.errors import InputError

AUTO = "auto"
_LOCAL = "local"
_VARIABLE = "RAY_ADDRESS"
DASHBOARD_VARIABLE = "RAY_API_SERVER_ADDRESS"
_GCS_PORT, _DASHBOARD_PORT = 6379, 8265
_CONNECT_S = 5.0
_LISTEN_S = 1.0  # for what a server says unasked, and again for its answer


@dataclass(frozen=True)
class ClusterAddress:
    """`host:port` of a cluster's GCS, or `auto` for the one that runs on this machine."""

    source: str
    text: str

    def __str__(self) -> str:
        return f"{self.source} is {self.text}"

    @property
    def host(self) -> str:
        """The host without brackets."""
        return self.text.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port."""
        return int(self.text.rpartition(":")[2])


def cluster_address(flag: str | None, environ: Mapping[str, str]) -> ClusterAddress | None:
    """The cluster to join by `--address` or $RAY_ADDRESS, None for Ray on this machine.

    `auto` is what the variable says, where it says anything, as it is for Ray. Raises `InputError`
    for what is no address of a GCS.
    """
    variable = environ.get(_VARIABLE, "").strip()
    if flag is not None and not flag.strip():
        raise InputError(
            f"got an empty --address, wanted HOST:{_GCS_PORT} of a cluster: leave it out for Ray on"
            " this machine"
        )
    address = ClusterAddress("--address", (flag or "").strip())
    if address.text in ("", AUTO) and variable:
        address = ClusterAddress(_VARIABLE, variable)
    if address.text in ("", _LOCAL):
        return None
    if address.text != AUTO:
        _check(address)
    return address


def dashboard_url(flag: str | None, environ: Mapping[str, str]) -> str:
    """Where jobs are handed in: `--address`, else $RAY_API_SERVER_ADDRESS, else this machine's.

    Raises `InputError` for what is no HTTP address.
    """
    variable = environ.get(DASHBOARD_VARIABLE) or f"http://127.0.0.1:{_DASHBOARD_PORT}"
    address = ClusterAddress(*(("--address", flag) if flag else (DASHBOARD_VARIABLE, variable)))
    try:
        is_dashboard = urlsplit(address.text).scheme in ("http", "https")
        host = urlsplit(address.text).hostname
    except ValueError:
        host = None
    if not host or not is_dashboard:
        raise InputError(
            f"{address}, wanted the dashboard of a cluster, http://HEAD:{_DASHBOARD_PORT}: correct"
            " it; on a node of the cluster `depthvar generate --address auto` needs none"
        )
    return address.text.rstrip("/")


def _check(address: ClusterAddress) -> None:
    scheme, found, rest = address.text.partition("://")
    if found:
        try:
            host = urlsplit(f"//{rest}").hostname or "HOST"
        except ValueError:
            host = "HOST"
        host = f"[{host}]" if ":" in host else host
        what = {
            "ray": "which is for Ray Client, whose driver is not part of the cluster",
            "http": "which is for `depthvar submit`",
            "https": "which is for `depthvar submit`",
        }.get(scheme.lower(), "which is no address of a Ray cluster")
        raise InputError(
            f"{address}, {what}: on a node of the cluster use --address {host}:{_GCS_PORT} or auto,"
            f" from elsewhere `depthvar submit --address http://{host}:{_DASHBOARD_PORT}`, for Ray"
            " on this machine --address local"
        )
    host, _, port = address.text.rpartition(":")
    is_host = bool(host) and not any(c.isspace() or c in "/@," for c in host)
    is_plain = ":" not in host or (host.startswith("[") and host.endswith("]"))
    if not is_host or not is_plain or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"{address}, wanted HOST:PORT of a Ray cluster, such as head:{_GCS_PORT} or"
            f" [::1]:{_GCS_PORT}, or auto: correct it"
        )


def require_listener(address: ClusterAddress) -> None:
    """Raise `InputError` where nothing accepts a connection within seconds."""
    try:
        socket.create_connection((address.host, address.port), timeout=_CONNECT_S).close()
    except (OSError, UnicodeError) as error:
        raise InputError(
            f"{address}, where nothing answers ({error}), wanted a Ray cluster: check the address"
            " and that the cluster runs"
        ) from None


def who_answers(address: ClusterAddress) -> str:
    """What kind of server speaks there, which is no Ray cluster, by what it says first."""
    said = b""
    try:
        with socket.create_connection((address.host, address.port), timeout=_LISTEN_S) as server:
            try:
                said = server.recv(64)
            except TimeoutError:
                server.sendall(b"GET / HTTP/1.0\r\n\r\n")
                said = server.recv(64)
    except OSError:
        pass
    return _server(said)


def _server(said: bytes) -> str:
    kinds = {
        b"HTTP/": f"an HTTP server, as a cluster's dashboard is on {_DASHBOARD_PORT},",
        b"SSH-": "an SSH server",
        b"-": "a Redis server",
        b"+": "a Redis server",
        b"\x15\x03": "a server that wants TLS (RAY_USE_TLS, if the cluster was started with it)",
        b"\x00\x00": "a gRPC server",
    }
    for start, kind in kinds.items():
        if said.startswith(start):
            return f"{kind} answers"
    return (
        f"something says {said[:20]!r}" if said else "something accepts connections, says nothing"
    )
