"""Run a Python script where nothing outside this machine can be reached, and say what tried.

python tests/helpers/machine/without_network.py SCRIPT ARGUMENTS
"""

import errno
import runpy
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

TRIED = "reached for the network:"
_connect = socket.socket.connect


def refuse(place: Any) -> NoReturn:
    print(TRIED, place, file=sys.stderr, flush=True)
    raise OSError(errno.ENETUNREACH, "Network is unreachable")


def connect(self: socket.socket, address: Any) -> None:
    # Processes of one machine talk by such sockets: W&B's do.
    inside = self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "::1", "localhost")
    return _connect(self, address) if inside else refuse(address)


if __name__ == "__main__":
    socket.socket.connect = connect
    socket.socket.connect_ex = connect
    socket.getaddrinfo = lambda host, *_, **__: refuse(host)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent.absolute())  # as Python does
    runpy.run_path(sys.argv[0], run_name="__main__")
