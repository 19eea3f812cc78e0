"""The socket that a server listens on."""

import socket

from mllm_msr.serving.main import listen


def test_replies_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off for sockets that are named as TCP only."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP
