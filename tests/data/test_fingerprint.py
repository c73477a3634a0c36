"""Perceptual hashes: the same picture in another file is near, another picture is not."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from clinkd.data.fingerprint import BITS, NEAR, near_pairs, perceptual_hash
from clinkd.data.phantoms import PhantomSpec, draw

PICTURES = [Image.open(io.BytesIO(draw(PhantomSpec(40), index)[0])).convert("L") for index in range(40)]


def bits(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), np.uint8)


def distance(a: Image.Image, b: Image.Image) -> int:
    first, second = perceptual_hash(a), perceptual_hash(b)
    assert first is not None and second is not None
    return int(np.unpackbits(bits(first) ^ bits(second)).sum())


def saved_as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=75)
    return Image.open(buffer)


CHANGES = {
    "the same": lambda image: image,
    "jpeg": saved_as_jpeg,
    "half the size": lambda image: image.resize((56, 56), Image.Resampling.BILINEAR),
    "RGB": lambda image: image.convert("RGB"),
    "palette": lambda image: image.convert("P"),
    "opaque": lambda image: image.convert("LA"),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.85),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_picture_in_another_file_is_near(change: str) -> None:
    for image in PICTURES[:10]:
        assert distance(image, CHANGES[change](image)) <= NEAR


def test_other_pictures_are_far() -> None:
    found = np.stack([bits(str(perceptual_hash(image))) for image in PICTURES])
    apart = np.unpackbits(found[:, None] ^ found[None], axis=-1).sum(-1)
    assert apart[~np.eye(len(found), dtype=bool)].min() > 5 * NEAR


def test_a_picture_without_content_has_no_hash() -> None:
    assert perceptual_hash(Image.new("L", (64, 64), 7)) is None
    assert perceptual_hash(Image.new("RGBA", (64, 64))) is None
    noise = np.random.default_rng(0).integers(0, 3, (256, 256), np.uint8)
    assert perceptual_hash(Image.fromarray(noise)) is None


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 40), st.integers(0, 20))
def test_pairs_are_those_that_comparing_all_finds(seed: int, count: int, flips: int) -> None:
    rng = np.random.default_rng(seed)
    parents = rng.integers(0, 2, (4, BITS), dtype=np.uint8)
    rows = parents[rng.integers(0, 4, count)]
    for row in rows:
        row[rng.choice(BITS, rng.integers(0, flips + 1), replace=False)] ^= 1
    hashes = np.packbits(rows, axis=1)
    wanted = {(a, b) for a in range(count) for b in range(a + 1, count) if (rows[a] != rows[b]).sum() <= NEAR}
    found = {(int(a), int(b)) for a, b in near_pairs(hashes)}
    assert found <= wanted
    # Of equal rows only neighbours are paired: what is joined, directly or not, is the same.
    assert groups(found, count) == groups(wanted, count)


def groups(pairs: set[tuple[int, int]], count: int) -> set[frozenset[int]]:
    group = {number: {number} for number in range(count)}
    for a, b in pairs:
        joined = group[a] | group[b]
        for number in joined:
            group[number] = joined
    return {frozenset(members) for members in group.values()}


def test_nothing_and_one_have_no_pairs() -> None:
    assert near_pairs(np.zeros((1, 32), np.uint8)).shape == (0, 2)
    assert near_pairs(np.zeros((2, 32), np.uint8)).tolist() == [[0, 1]]
