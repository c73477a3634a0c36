"""What has to end before the session's Ray does."""

from __future__ import annotations

from collections.abc import Callable

before_ray: list[Callable[[], None]] = []
"""Called once each, before ``ray.shutdown``: a thread that waits for Ray then would end in the dark."""
