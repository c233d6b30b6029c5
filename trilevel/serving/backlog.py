"""An end of listening that resets no connection which the system has taken already, where the system lets us."""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Protocol

# SO_ATTACH_FILTER, and a program of the one instruction "return 0": keep nothing of the packet
_ATTACH_FILTER = 26
_DROP = struct.pack("HBBI", 0x06, 0, 0, 0)
_ACCEPT_S = 0.05


class _HasFile(Protocol):
    def fileno(self) -> int: ...


async def let_in_the_last(listening: Iterable[_HasFile]) -> None:
    """Keep clients out that are not connected yet, and wait until those that are have been accepted.

    The system connects clients before the server accepts them; closing resets these, and their requests are lost. Linux
    alone can be told to ignore new clients in the meantime; they try again after a second, and are refused then.
    """
    if sys.platform != "linux":
        return
    for one in listening:
        with socket.socket(fileno=os.dup(one.fileno())) as same:
            program = ctypes.create_string_buffer(_DROP)
            same.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, struct.pack("HL", 1, ctypes.addressof(program)))
    # the loop accepts all that wait as soon as it runs
    await asyncio.sleep(_ACCEPT_S)
