"""A whole run for the report's tests: phantoms as images, answers made from the truth by known mistakes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy import ndimage

from clinkd.data.boxes import format_box, iou, parse_boxes
from clinkd.data.phantoms import NAMES, PhantomSpec, draw
from clinkd.data.records import MODALITIES, Record, sample_id
from clinkd.data.regions import coverage
from clinkd.distill.certificate import certify
from clinkd.report.html import ReportInputs

SPEC = PhantomSpec(images=32, seed=5)


def shifted(answer: str, by: int) -> str:
    """The answer with its boxes moved to the right and down, as far as the grid allows."""
    for box in parse_boxes(answer):
        dx, dy = min(by, 1000 - box[2]), min(by, 1000 - box[3])
        answer = answer.replace(
            format_box(box), format_box((box[0] + dx, box[1] + dy, box[2] + dx, box[3] + dy))
        )
    return answer


def predictions_of(record: Record, rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for index, turn in enumerate(record.turns):
        response = shifted(turn.answer, int(rng.integers(0, 250))) if turn.task == "vg" else turn.answer
        if turn.task == "roc" and rng.random() < 0.4:
            response = str(rng.choice(NAMES)).capitalize()
        if turn.task in ("rc", "mia"):
            response = " ".join(word for word in response.split() if rng.random() < 0.8)
        rows.append(
            {
                "id": index,
                "sample": sample_id(record.id, index),
                "image": record.image,
                "task": turn.task,
                "question": turn.question,
                "annotation": turn.answer,
                "response": response,
            }
        )
    return rows


def feedback_of(rows: Iterable[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row["task"] != "vg":
            continue
        truth, wrong = row["annotation"], row["response"]
        overlap = iou(parse_boxes(truth)[0], parse_boxes(wrong)[0])
        if overlap > 0.5:
            continue
        candidates = []
        for by in rng.integers(5, 150, 4):
            text = shifted(truth, int(by))
            candidates.append(
                {
                    "text": text,
                    "score": float(0.5 + 0.5 * iou(parse_boxes(truth)[0], parse_boxes(text)[0])),
                    "similarity": 0.97,
                    "iou": iou(parse_boxes(truth)[0], parse_boxes(text)[0]),
                    "veto": "repeats_truth" if by < 15 else "",
                }
            )
        open_ones = [item for item in candidates if not item["veto"] and item["iou"] > 0.5]
        best = max(open_ones, key=lambda item: item["score"], default=None)
        found.append(
            {
                "sample": row["sample"],
                "image": row["image"],
                "task": "vg",
                "question": row["question"],
                "truth": truth,
                "wrong": wrong,
                "reason": "low_iou" if overlap else "no_overlap",
                "score_wrong": overlap,
                "candidates": candidates,
                "chosen": best["text"] if best else truth,
                "source": "candidate" if best else "truth",
                "round": 1 + len(found) % 2,
                "after": best["text"] if best else wrong,
                "mended": best is not None,
            }
        )
    return found


def guide_samples_of(drawn: Iterable[tuple[bytes, Record]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """What a fair guide would say of each image's first grounding question: blurred truth and some noise."""
    found = []
    for number, (_, record) in enumerate(drawn):
        index, turn = next((i, turn) for i, turn in enumerate(record.turns) if turn.task == "vg")
        grid = (4, 4) if number % 2 else (7, 7)
        truth = coverage(tuple(parse_boxes(turn.answer)), *grid).reshape(grid)
        blurred = ndimage.gaussian_filter(truth, 0.6)
        relevance = 0.9 * blurred / blurred.max() + 0.1 * rng.random(grid)
        found.append(
            {
                "sample": sample_id(record.id, index),
                "image": record.image,
                "question": turn.question,
                "task": turn.task,
                "alignment": float(0.3 + 0.7 * rng.random()),
                "relevance": relevance.ravel().tolist(),
                "grid": list(grid),
                "merged": [8, 8],
                "before": 15,
                "after": 32,
            }
        )
    return found


def metrics_rows(rng: np.random.Generator, measured: bool = True) -> list[dict[str, Any]]:
    """Lines of training; not ``measured``: as runs wrote them that knew losses and samples a second alone."""
    rows: list[dict[str, Any]] = []
    for stage, steps in (("teacher", 600), ("distill", 400), ("reflect", 120)):
        for step in range(0, steps, 5):
            loss = 3.5 * float(np.exp(-step / 130)) + 0.3 + 0.15 * float(rng.random())
            row = {"stage": stage, "step": step, "loss": loss, "samples_per_s": 40.0 + float(rng.random())}
            if stage == "distill":
                row |= {"kd": 0.4 * loss, "ce": 0.9 * loss}
            if measured:
                row |= {"seconds": 0.2, "tokens": 90, "input_tokens": 300, "tokens_per_s": 1500.0 + step}
                row |= {"tflops_per_s": 0.0125, "memory_gib": 1.25 + step / 1e4, "grad_norm": 0.4}
            if measured and stage == "distill":
                row |= {"admitted_margin": 0.8 - step / 1000, "admitted_share": 0.5 + step / 800}
            if stage == "reflect":
                row["round"] = 1
            rows.append(row)
    rows.append({"stage": "reflect", "round": 1, "event": "judged", "wrong": 41, "right": 120})
    return rows


def evaluation() -> dict[str, Any]:
    """eval.json with fixed numbers: what a report does with them is what is tested."""
    vg = {m: {"recall_at_50": 0.4 + 0.05 * i, "hits": 8 + i, "targets": 20} for i, m in enumerate(MODALITIES)}
    roc = {m: {"recall": 0.8 - 0.04 * i, "hits": 16 - i, "rows": 20} for i, m in enumerate(MODALITIES)}
    text = {
        m: {
            "bleu_1": 0.7,
            "bleu_2": 0.6,
            "bleu_3": 0.5,
            "bleu_4": 0.4,
            "meteor": 0.35,
            "rouge_l": 0.7 - 0.02 * i,
            "cider": 2.9,
        }
        for i, m in enumerate(MODALITIES)
    }
    mean = {key: sum(row[key] for row in text.values()) / 8 for key in text["ct"]}
    return {
        "vg": {
            "mean": {"recall_at_50": 0.575},
            "modalities": vg,
            "rows": 160,
            "skipped": {"no_target": 3},
            "honest": {
                "recall_at_50": {"value": 0.57, "low": 0.51, "high": 0.63},
                "iou_mean": {"value": 0.52, "low": 0.48, "high": 0.55},
                "no_box_rate": {"value": 0.01, "low": None, "high": None},
            },
        },
        "roc": {
            "mean": {"recall": 0.66},
            "modalities": roc,
            "rows": 160,
            "skipped": {},
            "honest": {"recall_whole_word": {"value": 0.64, "low": 0.6, "high": 0.68}},
        },
        "rc": {
            "mean": mean,
            "modalities": text,
            "rows": 32,
            "spice": None,
            "spice_reason": "No directory of SPICE jars is given.",
        },
        "mia": {"mean": {**mean, "mbmr": 0.54}, "modalities": text, "rows": 32},
        "baselines": {"vg": 0.06, "roc": 0.09, "vg_box": [312, 300, 640, 655], "roc_answer": "Liver"},
        "versions": {"pycocoevalcap": "1.2"},
    }


def counted(answered: int, reasons: dict[str, int], **more: Any) -> dict[str, Any]:
    """Answers counted as the stage reflect does."""
    wrong = sum(reasons.values())
    found = {"answered": answered, "wrong": wrong, "error_rate": wrong / answered, "reasons": reasons}
    return found | more


def account() -> dict[str, Any]:
    """Two rounds, of which the first is kept."""
    rounds = []
    for low_iou in (30, 34):
        groups = {
            kind: {name: counted(60, {"low_iou": low_iou // 2}, fixed=12, broke=3) for name in names}
            for kind, names in (("by_task", ("roc", "vg")), ("by_modality", ("ct", "mr")))
        }
        before = counted(120, {"low_iou": 50, "no_box": 2}, **groups)
        after = counted(120, {"low_iou": low_iou}, fixed=24, broke=6, **groups)
        rounds.append(
            {"before": before, "after": after, "corrected": 52, "from_candidates": 19,
             "generated": {"student": 400, "corrector": 208},
             "validation": counted(160, {"low_iou": low_iou, "laterality": 3})}
        )  # fmt: skip
    return {"before": counted(160, {"low_iou": 60, "no_box": 5}), "rounds": rounds, "kept": 1}


def whole_run(**changes: Any) -> ReportInputs:
    rng = np.random.default_rng(3)
    drawn = [draw(SPEC, index) for index in range(SPEC.images)]
    files = {record.image: png for png, record in drawn}
    predictions = [row for _, record in drawn for row in predictions_of(record, rng)]
    stages = [
        {
            "stage": stage,
            "fingerprint": f"{index:02d}" * 32,
            "seconds": 37.5 * index,
            "counts": {"rows": 1200 * index},
            "skipped": index < 2,
        }
        for index, stage in enumerate(
            ("prepare", "guide", "teacher", "label", "distill", "reflect", "evaluate")
        )
    ]
    given: dict[str, Any] = {
        "name": "tiny",
        "evaluation": evaluation(),
        "metrics": metrics_rows(rng),
        "predictions": predictions,
        "feedback": feedback_of(predictions, rng),
        "reflection": account(),
        "images": lambda names: {name: files[name] for name in names if name in files},
        "config": "run:\n  name: tiny\nmodel:\n  lambda: 2.0\n",
        "versions": {"ray": "2.60", "torch": "2.10"},
        "certificate": certify(),
        "stages": stages,
        "guide": {"retrieval_at_1": 0.41, "chance": 0.03, "regions": 120, "patch_auc": 0.91},
        "guide_samples": guide_samples_of(drawn[:10], rng),
        "sweep": [
            {
                "trial": i,
                "lambda": 1.0 + i / 2,
                "gamma": 0.1 * i,
                "a": 0.5,
                "T": 0.5,
                "VG Recall@0.5": 0.5 + i / 50,
            }
            for i in range(4)
        ],
        "guidance": {
            "lambda_h": 2.0,
            "lambda_w": 3.0,
            "alpha_h": 1.0,
            "alpha_w": 1.5,
            "gamma": 0.8,
            "mode": "patch",
        },
    }
    return ReportInputs(**{**given, **changes})
