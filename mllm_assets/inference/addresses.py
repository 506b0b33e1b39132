"""Where people and programs reach a model: addresses, their ports, and the names that a browser may ask by."""

import errno
import ipaddress
import socket

from mllm_assets.errors import MachineError

# Names in a request's Host header. A foreign page, whose name was made to point to this machine, sends another.
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")
BOARD_PORT = 7861
PAGES = "/pages/"  # where the board has the pages that assets wrote, by their paths below the project's root


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_of(host: str) -> list[str]:
    """The names in the Host header of those who ask a loopback address."""
    return sorted({*LOOPBACK_NAMES, f"[{host}]" if ":" in host else host})


def url(host: str, port: int) -> str:
    """The address as a browser takes it."""
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def listen(host: str, port: int) -> socket.socket:
    """Take a port, 0 for a free one.

    Raises:
        MachineError: It is taken, not allowed, or the machine has no such address. Says which.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OverflowError:
        problem = f"There is no port {port}: ports are 1 to 65535. Give another --port."
    except OSError as error:
        problem = f"Cannot listen on {host} ({error.strerror or error}). Give --host an address of this machine."
        if error.errno == errno.EADDRINUSE:
            problem = (
                f"Port {port} of {host} is in use by another program, perhaps by a page or server that was started "
                "before. End that one, or give another --port."
            )
        elif error.errno == errno.EACCES:
            problem = f"Port {port} of {host} may not be taken by this user. Give a --port above 1023."
    raise MachineError(problem)
