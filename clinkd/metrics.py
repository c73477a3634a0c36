"""What a run tells Ray's metrics: the table of all names, and how a number gets there.

Decisions:
- Every name stands here once, ``clinkd_<area>_<quantity>_<unit>``. Ray puts ``ray_`` before it and ``_total``
  behind a counter (``exposed``). Rules and dashboards (cluster/monitoring) are held against the table.
- Times are unix seconds of the last time that something went well, not ages: an age stands still with the
  process that would count it, while ``time() - x`` grows.
- A tag is one of TAGS, and none carries what comes from data: no image's name, no answer, no error's text.
  ``run`` is the run's name, which its schema keeps to 64 letters, digits, dots, dashes and underscores; it
  already names a folder, a Kubernetes job and a run in MLflow. A trial's ends in a digest of its values.
- Numbers go to a Ray that this process is a part of. Where there is none, nothing happens: none is started,
  and Ray is not even imported. What fails here is said once and costs the numbers, never the training.
- Ray exports a gauge every ten seconds for as long as its process lives, and forgets it 20 seconds later. So
  the driver, which outlives the workers of its stages, says what is under way.
"""

from __future__ import annotations

import functools
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Literal

TAGS = ("run", "stage", "rank", "zero_stage", "round", "state", "metric")

_about: dict[str, str] = {}
_failed = False


@dataclass(frozen=True)
class Quantity:
    """One number. ``tags``: of TAGS; those that ``about`` has told need not be said again."""

    name: str
    kind: Literal["gauge", "counter"]
    description: str
    tags: tuple[str, ...] = ("run", "stage")

    @property
    def unit(self) -> str:
        return self.name.rpartition("_")[2]

    @property
    def exposed(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}" + ("_total" if self.kind == "counter" else "")

    def set(self, value: float, **tags: str) -> None:
        """Of a gauge: its value from now on."""
        self._record("set", value, tags)

    def add(self, value: float, **tags: str) -> None:
        """Of a counter: what came to it; nothing where that is not positive."""
        if value > 0:
            self._record("inc", value, tags)

    def _record(self, how: str, value: float, tags: dict[str, str]) -> None:
        global _failed
        if _failed or not _in_ray():
            return
        try:
            known = _about | tags
            getattr(_made(self), how)(float(value), {key: known.get(key, "") for key in self.tags})
        except Exception as error:
            _failed = True
            warnings.warn(f"Ray takes no metrics here ({type(error).__name__}); none are sent", stacklevel=3)


def about(**tags: str) -> None:
    """Tags of all that this process tells from here on: a training worker has one job at a time."""
    _about.clear()
    _about.update(tags)


def _in_ray() -> bool:
    """Whether this process is a part of a Ray; a client of one (ray://) is none."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not hasattr(ray, "is_initialized") or not ray.is_initialized():
        return False
    client: Any = sys.modules.get("ray.util.client")
    return client is None or not client.ray.is_connected()


@functools.cache
def _made(quantity: Quantity) -> Any:
    from ray.util import metrics

    kind = metrics.Gauge if quantity.kind == "gauge" else metrics.Counter
    return kind(quantity.name, description=quantity.description, tag_keys=quantity.tags)


TRAIN_ACTIVE = Quantity(
    "clinkd_train_active_jobs", "gauge", "1 while the driver waits for a training job, else 0.",
    ("run", "stage", "zero_stage"),
)  # fmt: skip
TRAIN_BEGUN = Quantity(
    "clinkd_train_begun_timestamp_seconds", "gauge", "When the driver handed out the training job; unix time."
)
TRAIN_STEP = Quantity("clinkd_train_done_steps", "gauge", "Optimiser steps done.")
TRAIN_TOTAL = Quantity("clinkd_train_planned_steps", "gauge", "Optimiser steps of the whole job.")
TRAIN_LOSS = Quantity("clinkd_train_loss_nats", "gauge", "Mean loss a token of the last finite step.")
TRAIN_SECONDS = Quantity("clinkd_train_step_seconds", "gauge", "Wall time of the last step.")
TRAIN_SAMPLES = Quantity("clinkd_train_seen_samples", "counter", "Samples trained on, over all ranks.")
TRAIN_TOKENS = Quantity("clinkd_train_input_tokens", "counter", "Input tokens trained on, over all ranks.")
TRAIN_FINITE = Quantity(
    "clinkd_train_finite_step_timestamp_seconds", "gauge",
    "When the last step with a finite loss and finite gradients ended; unix time.",
)  # fmt: skip
TRAIN_NONFINITE = Quantity(
    "clinkd_train_nonfinite_steps", "counter", "Steps left out: loss or gradients were not finite."
)
TRAIN_NONFINITE_AT = Quantity(  # the first increase of a counter that begins at 1 is none to Prometheus
    "clinkd_train_nonfinite_step_timestamp_seconds", "gauge", "When the last step was left out; unix time."
)
TRAIN_GPU = Quantity(
    "clinkd_train_gpu_memory_bytes", "gauge", "Memory that torch holds on the rank's GPU; none on CPUs.",
    ("run", "stage", "rank"),
)  # fmt: skip

CHECKPOINT_SAVED = Quantity(
    "clinkd_checkpoint_saved_timestamp_seconds", "gauge", "When the last checkpoint was whole; unix time."
)
CHECKPOINT_SIZE = Quantity("clinkd_checkpoint_size_bytes", "gauge", "Bytes of the last checkpoint.")
CHECKPOINT_SECONDS = Quantity(
    "clinkd_checkpoint_save_seconds", "gauge", "Wall time of saving the last checkpoint; training waits."
)
CHECKPOINT_SENT = Quantity(
    "clinkd_checkpoint_sent_timestamp_seconds", "gauge",
    "When the newest checkpoint was given to the store (compute.checkpoint_store); unix time.",
)  # fmt: skip
CHECKPOINT_COPIED = Quantity(
    "clinkd_checkpoint_copied_timestamp_seconds", "gauge",
    "When the newest checkpoint whose copy is whole was given to the store; at first, when copying began.",
)  # fmt: skip

DATA_READ = Quantity("clinkd_data_read_rows", "gauge", "Rows that prepare read.", ("run",))
DATA_QUARANTINED = Quantity("clinkd_data_quarantined_rows", "gauge", "Rows that prepare refused.", ("run",))
DATA_DUPLICATE = Quantity("clinkd_data_duplicate_rows", "gauge", "Exact repeats among them.", ("run",))

REFLECT_ANSWERED = Quantity(
    "clinkd_reflect_answered_samples", "gauge", "Training questions answered in a round.", ("run", "round")
)
REFLECT_WRONG = Quantity(
    "clinkd_reflect_wrong_samples", "gauge", "Answers of a round that need correction.", ("run", "round")
)
REFLECT_ERROR = Quantity(
    "clinkd_reflect_validation_error_ratio", "gauge",
    "Share of wrong answers to the validation split after a round.", ("run", "round"),
)  # fmt: skip

SWEEP_TRIALS = Quantity(
    "clinkd_sweep_known_trials", "gauge", "Trials by state: running, waiting, complete, pruned, fail.",
    ("run", "state"),
)  # fmt: skip
SWEEP_WANTED = Quantity("clinkd_sweep_wanted_trials", "gauge", "Trials of the whole sweep.", ("run",))
SWEEP_BEST = Quantity(
    "clinkd_sweep_best_score", "gauge", "Best value so far of a metric of the sweep.", ("run", "metric")
)

TABLE = tuple(value for value in globals().values() if isinstance(value, Quantity))
