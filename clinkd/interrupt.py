"""SIGTERM taken like a Ctrl-C, so that what is under way can be saved before the command ends.

It is raised as a plain KeyboardInterrupt because that is the only exception that Ray passes on out of a call
that waits; that it was SIGTERM is remembered beside it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_terminated = False


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt in the main thread; other threads change nothing."""
    global _terminated
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _terminated = False
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def terminated() -> bool:
    """Whether the last ``terminable`` was ended by SIGTERM (``ray job stop``, Kubernetes, ``kill``)."""
    return _terminated


@contextmanager
def handlers_kept() -> Iterator[None]:
    """What a library inside does to the handler of SIGTERM is undone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: Any) -> None:
    global _terminated
    _terminated = True
    raise KeyboardInterrupt
