"""Servers that are no Ray cluster, each known by what it says."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from pipeline.run.address import ClusterAddress

Talk = Callable[[socket.socket], object]


@contextlib.contextmanager
def serving(talk: Talk) -> Iterator[ClusterAddress]:
    """A server that talks to everyone who comes, and then waits for them to leave."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer(peer: socket.socket) -> None:
            with peer, contextlib.suppress(OSError):
                peer.settimeout(10)
                talk(peer)
                while peer.recv(1000):
                    pass

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    threading.Thread(target=answer, args=[peer], daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield ClusterAddress("--address", f"127.0.0.1:{listener.getsockname()[1]}")


def after_asking(reply: bytes) -> Talk:
    return lambda peer: (peer.recv(1000), peer.sendall(reply))


SERVERS: dict[str, tuple[Talk, str]] = {
    "ssh": (lambda peer: peer.sendall(b"SSH-2.0-OpenSSH_9.6\r\n"), "an SSH server answers"),
    "http": (
        after_asking(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"),
        "an HTTP server, as a cluster's",
    ),
    "redis": (after_asking(b"-ERR unknown command 'GET'\r\n"), "a Redis server answers"),
    "tls": (after_asking(b"\x15\x03\x01\x00\x02\x02\x46"), "a server that wants TLS"),
    "mysql": (lambda peer: peer.sendall(b"J\x00\x00\x00\n5.7.0"), r"something says b'J\x00"),
    "silent": (lambda peer: None, "accepts connections, says nothing"),
    "closing": (lambda peer: peer.close(), "accepts connections, says nothing"),
}
