"""Ports for servers that have to be told one."""

import random
import socket


def free_port() -> int:
    """A port of loopback that nobody uses, and that the system gives to no client until a server has it."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)  # those of clients are above
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
