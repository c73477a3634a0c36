"""Guided training with the model split over two workers; what it saves answers without any of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clinkd.data.phantoms import PhantomSpec

pytestmark = pytest.mark.slow

ANSWER = """
import sys
import torch
from transformers import AutoImageProcessor, AutoTokenizer
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.data.images import decode
from clinkd.model.chat import encode
from clinkd.model.clinkd_qwen2vl import guidance_of, load_model
from clinkd.model.generate import generate_answers

folder = sys.argv[1]
model = load_model(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
image = processor(images=[decode(draw(PhantomSpec(2), 0)[0])], return_tensors="pt")
patches = int(image["image_grid_thw"].prod()) // 4
prompt, _ = encode(tokenizer, "Where is the liver?", "", patches)
mode = guidance_of(model.config).guided
scores = {"pair": {"alignment": torch.tensor([[0.3]])}, "patch": {"relevance": torch.linspace(0, 1, patches)}}
answers = generate_answers(
    model, tokenizer, [prompt], image["pixel_values"], image["image_grid_thw"], [0], max_new_tokens=8,
    **scores[mode],
)
assert "ray" not in sys.modules
print(mode, repr(answers[0][0]))
"""


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=16), out, test_fraction=0.3, images_per_shard=8)
    return out


@pytest.mark.parametrize("mode", [pytest.param("pair", marks=pytest.mark.full), "patch"])
def test_a_guided_model_trains_saves_and_answers_in_plain_python(mode, prepared, start, tmp_path) -> None:
    from tiny_training import made_up_scores, train

    import clinkd
    from clinkd.model.clinkd_qwen2vl import guidance_of, load_model
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.tasks import VqaSpec

    guidance = RopeGuidance(1.5, 2.25, 0.5, 0.75, 0.8, mode)
    spec = VqaSpec(str(start), guidance, train_vision=True, scores=made_up_scores(prepared, tmp_path))
    lines = train(prepared, tmp_path / "out", spec, zero=3, steps=20)
    assert [line["step"] for line in lines] == list(range(1, 21)) and lines[-1]["ce"] < 0.8 * lines[0]["ce"]
    folder = tmp_path / "out" / "model"
    model, before = load_model(folder), load_model(start).state_dict()
    assert guidance_of(model.config) == guidance
    for name, value in model.state_dict().items():
        assert value.isfinite().all() and value.shape == before[name].shape, name
    root = str(Path(clinkd.__file__).parents[1])
    answered = subprocess.run(
        [sys.executable, "-c", ANSWER, str(folder)], capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert answered.returncode == 0 and answered.stdout.splitlines()[-1].startswith(mode), answered.stderr
