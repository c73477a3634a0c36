"""Near-duplicate images: perceptual hashes, and which of many lie close to each other.

Decisions:
- The hash is ImageHash's pHash (signs of a discrete cosine transform's low frequencies against their median)
  of 16 x 16 = 256 bits. Measured on phantoms and real images: saved again as JPEG of quality 50, halved,
  doubled, made brighter or noisier an image moves by 2-12 bits; two different images were never closer than
  86. ``NEAR`` = 12 lies far from both. Cropping by 2% moves an image by 32-52 bits: that is not found.
- An image without content (one grey nearly everywhere) has no hash: its bits would be noise, and blank slices
  of different patients are no leak.
- 256 bits within distance 12 agree wholly in at least one of 13 bands: only images that share a band are
  compared, all at once in numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE = 16
BITS = SIDE * SIDE
NEAR = 12
"""Largest Hamming distance of two images that count as one, of 256 bits."""
FLAT = 2.0
"""Standard deviation in grey levels (0-255) of a 64 x 64 thumbnail under which an image says nothing."""
_CROWD = 64
"""Images of one band compared with each other beyond which only neighbours are (see ``near_pairs``)."""


def perceptual_hash(image: Image.Image) -> str | None:
    """256 bits as 64 hexadecimal digits; None for an image without content."""
    import imagehash
    from PIL import Image

    if image.mode == "P" and "transparency" in image.info:  # else PIL warns and guesses
        image = image.convert("RGBA")
    grey = image.convert("L")
    if np.asarray(grey.resize((64, 64), Image.Resampling.BOX), np.float32).std() < FLAT:
        return None
    return str(imagehash.phash(grey, hash_size=SIDE))


def near_pairs(hashes: np.ndarray, limit: int = NEAR) -> np.ndarray:
    """Pairs of rows at most ``limit`` bits apart.

    Args:
        hashes: uint8 [N, 32].

    Returns:
        int64 [pairs, 2], first < second, sorted, each pair once. Of rows with equal bits only neighbours (in
        the order of the rows) are paired, and in a band that more than 64 different rows share each is
        compared with its next 64: enough to join what belongs together, short of pathological data.
    """
    found = []
    unique, inverse = np.unique(hashes, axis=0, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    same = inverse[order][1:] == inverse[order][:-1]
    found.append(np.stack([order[:-1][same], order[1:][same]], 1))
    first = np.full(len(unique), len(hashes), np.int64)
    np.minimum.at(first, inverse, np.arange(len(hashes)))
    for band in np.array_split(np.arange(BITS), limit + 1):
        around = unique[:, band[0] // 8 : band[-1] // 8 + 1]  # only its bytes: of millions all bits are much
        bits = np.unpackbits(around, axis=1)[:, band - band[0] // 8 * 8]
        keys = bits.astype(np.int64) @ (1 << np.arange(len(band), dtype=np.int64))
        found.append(first[_close_in_band(unique, keys, limit)])
    pairs = np.sort(np.concatenate(found).astype(np.int64), axis=1)
    return np.unique(pairs, axis=0)


def _close_in_band(unique: np.ndarray, keys: np.ndarray, limit: int) -> np.ndarray:
    """Pairs [pairs, 2] of rows with the same key that are at most ``limit`` bits apart."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    found = [np.empty((0, 2), np.int64)]
    for offset in range(1, min(_CROWD, len(keys) - 1) + 1):
        at = np.flatnonzero(keys[offset:] == keys[:-offset])
        if not len(at):
            break
        a, b = order[at], order[at + offset]
        close = np.unpackbits(unique[a] ^ unique[b], axis=1).sum(1) <= limit
        found.append(np.stack([a[close], b[close]], 1))
    return np.concatenate(found)
