"""The Python client of a trilevel server, or of any other that speaks the Open Inference Protocol over REST."""

from trilevel.client.asynchronous import AsyncClient
from trilevel.client.attempts import Retry
from trilevel.client.faults import BusyError, CallError, FailedError, LateError, RefusedError
from trilevel.client.synchronous import Client
from trilevel.client.wire import Result

__all__ = [
    "AsyncClient",
    "BusyError",
    "CallError",
    "Client",
    "FailedError",
    "LateError",
    "RefusedError",
    "Result",
    "Retry",
]
