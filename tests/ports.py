"""Ports for servers of the tests that bind them later."""

import random
import socket

BELOW_EPHEMERAL = range(20_000, 32_000)  # Linux gives connections of other tests the ports from 32768 on


def free_port() -> int:
    """A port of this machine that nobody uses, and that no connection is given until a server has started on it."""
    while True:
        port = random.SystemRandom().choice(BELOW_EPHEMERAL)
        with socket.socket() as listener:
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
