"""The images of a record as they travel: encoded, in the record's order; and one of them decoded."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def encoded_images(record: Mapping[str, Any]) -> list[bytes]:
    """All images of a shard's row, or of a batch's, whose lists may be arrays; in the record's order."""
    more = record.get("more_png")
    return [bytes(record["png"]), *(bytes(png) for png in (() if more is None else more))]


def decode(content: bytes) -> Any:
    """An image as RGB, PIL."""
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB")
