"""The certificate of a run's distillation loss; see distill/certificate.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clinkd.config import DistillSection, RunConfig
from clinkd.stages.base import write_whole

FILE = "certificate.json"


class CertificateError(RuntimeError):
    """The loss that a run is configured for is not what it should be."""


def method_of(options: DistillSection) -> dict[str, Any]:
    """What ``distill_loss`` is called with."""
    return options.model_dump(include={"a", "temperature", "divergence", "jsd_beta", "scale_t2"})


def certificate(config: RunConfig) -> dict[str, Any]:
    """What ``certify`` finds for the configured loss, in the type that training computes in."""
    from clinkd.distill.certificate import certify
    from clinkd.distill.losses import CHUNK_SIZE

    options = config.distill
    half = config.compute.precision == "bf16" or config.model.dtype == "bfloat16"
    return certify(
        **method_of(options),
        # The cases have some dozens of tokens: a chunk larger than that would never be cut.
        chunk_size=min(options.chunk_size, CHUNK_SIZE),
        dtype="bfloat16" if half else "float32",
        given="topk" if options.cache.form == "topk" and options.teacher == "cache" else "states",
    )


def stamp(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Writes the certificate into an artifact's folder.

    Raises:
        CertificateError: it failed; nothing has been trained.
    """
    found = certificate(config)
    write_whole(folder / FILE, json.dumps(found, indent=1) + "\n")
    if not found["ok"]:
        raise CertificateError(
            f"the loss certificate failed, so nothing was trained: {found['failures'][0]} (`clinkd certify` "
            "shows all); this is a fault of the installation or of clinkd, please report it"
        )
    return found
