"""What the processes of a command take, read from /proc, for large.py and growth.py. Linux alone.

Decisions:
- A process is of the command when it descends from it; once seen it counts, whoever adopts it later.
- Its kind is its title at that moment: Ray's workers are named by what they do, and do one after the other.
- ``own`` is what goes away with the process: anonymous memory and file pages that nobody else maps. Objects
  in Ray's store (shared memory) are nobody's own. smaps_rollup, from which the file pages come, walks all
  pages: read where the resident size has changed, at most once a second.
- What ended processes read is part of the counters of the parent that reaped them: it is taken off there.
  What a process read between its last sample and its end counts for its parent, or is missed.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field

MEMORY = ("own", "pss_anon", "rss", "rss_unshared")
"""Bytes: anonymous and private file pages; proportional anonymous; resident; resident without shared."""
COUNTERS = ("rchar", "read_bytes", "write_bytes")
"""Of /proc/PID/io: what read() gave (files, pipes), and what came from and went to disks."""
EVERY = 0.25
ROLLUP_EVERY, ROLLUP_CHANGE, ROLLUP_LATEST = 1.0, 4 << 20, 5.0


@dataclass
class Seen:
    """A process that was seen, by the time it began: numbers are given again."""

    began: int
    parent: int
    io: Counter[str] = field(default_factory=Counter)
    clean: int = 0  # of the last smaps_rollup
    rss_then: int = 0
    looked: float = -1e9


class Watch:
    """Samples a process and its descendants in a thread, from its start to ``stop``.

    ``stage`` may be set at any time: what is read counts for it, and peaks remember it.
    """

    def __init__(self, root: int, root_kind: str = "driver") -> None:
        self.root, self.root_kind, self.stage = root, root_kind, "start"
        self.peaks: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(MEMORY, 0))
        self.peak_stage: dict[str, str] = {}  # of the kind's own
        self.stage_peaks: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))  # own by kind
        self.most: dict[str, int] = defaultdict(int)  # processes of a kind at one time
        self.whole = 0  # own of all processes at one time
        self.whole_stage = ""
        self.read: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
        self.seconds: dict[str, float] = defaultdict(float)
        self.own_seconds = 0.0  # CPU time of the sampling itself
        self.error: Exception | None = None
        self._seen: dict[int, Seen] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        if self.error is not None:
            raise RuntimeError("the processes were not watched to their end") from self.error

    def _follow(self) -> None:
        try:
            self._samples()
        except Exception as error:
            self.error = error
        self.own_seconds = time.thread_time()

    def _samples(self) -> None:
        before = time.monotonic()
        stopped = False
        while not stopped:
            stopped = self._stop.wait(EVERY)
            self._sample()
            now = time.monotonic()
            self.seconds[self.stage] += now - before
            before = now

    def _sample(self) -> None:
        stage, now = self.stage, time.monotonic()
        alive = self._alive()
        ended = {pid: seen for pid, seen in self._seen.items() if pid not in alive}
        of_ended: dict[int, Counter[str]] = defaultdict(Counter)
        for pid, seen in ended.items():
            of_ended[seen.parent].update(seen.io)
            del self._seen[pid]
        kinds: Counter[str] = Counter()
        whole = 0
        for pid, (began, parent) in alive.items():
            seen = self._seen.setdefault(pid, Seen(began, parent))
            seen.parent = parent
            kind = self.root_kind if pid == self.root else kind_of(_title(pid))
            with contextlib.suppress(OSError, KeyError):  # it ends just now
                memory = self._memory(pid, seen, now)
                whole += self._count(kind, memory, stage)
                kinds[kind] += 1
                self.read[stage][kind].update(_delta(pid, seen, of_ended.get(pid, Counter())))
        for kind, count in kinds.items():
            self.most[kind] = max(self.most[kind], count)
        if whole > self.whole:
            self.whole, self.whole_stage = whole, stage

    def _alive(self) -> dict[int, tuple[int, int]]:
        """(began, parent) of the root, its descendants, and what has been one."""
        table = dict(_table())
        known = {pid for pid, seen in self._seen.items() if pid in table and table[pid][0] == seen.began}
        known |= {self.root} & table.keys()
        children: dict[int, list[int]] = defaultdict(list)
        for pid, (_, parent) in table.items():
            children[parent].append(pid)
        waiting, found = list(known), set(known)
        while waiting:
            new = [pid for pid in children[waiting.pop()] if pid not in found]
            found.update(new)
            waiting += new
        return {pid: table[pid] for pid in found}

    def _memory(self, pid: int, seen: Seen, now: float) -> dict[str, int]:
        status = _pairs(f"/proc/{pid}/status")
        rss, anon, shared = status["VmRSS"], status["RssAnon"], status["RssShmem"]
        pss = 0  # of this look alone: the process may have had another kind at the last
        age, change = now - seen.looked, abs(rss - seen.rss_then)
        if age >= ROLLUP_LATEST or (age >= ROLLUP_EVERY and change >= ROLLUP_CHANGE):
            pages = _pairs(f"/proc/{pid}/smaps_rollup")
            # Written pages of the store are dirty, of files clean: what is private and clean is a file's.
            seen.clean, pss = pages["Private_Clean"], pages["Pss_Anon"]
            seen.looked, seen.rss_then = now, rss
        return {"own": anon + seen.clean, "pss_anon": pss, "rss": rss, "rss_unshared": rss - shared}

    def _count(self, kind: str, memory: dict[str, int], stage: str) -> int:
        own = memory["own"]
        if own > self.peaks[kind]["own"]:
            self.peak_stage[kind] = stage
        for name, value in memory.items():
            self.peaks[kind][name] = max(self.peaks[kind][name], value)
        self.stage_peaks[stage][kind] = max(self.stage_peaks[stage][kind], own)
        return own


def _table() -> list[tuple[int, tuple[int, int]]]:
    """(pid, (began, parent)) of all processes that have not ended."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                # After the command, in brackets, which may hold blanks and brackets.
                fields = _text(f"/proc/{name}/stat").rpartition(")")[2].split()
                if fields[0] != "Z":
                    found.append((int(name), (int(fields[19]), int(fields[1]))))
    return found


def _text(path: str) -> str:
    # Some hundred times a sample: pathlib and decoding by lines would take most of the time.
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.read(handle, 1 << 16).decode(errors="replace")
    finally:
        os.close(handle)


def _pairs(path: str) -> dict[str, int]:
    """Bytes by name of ``Name:  123 kB``."""
    return {
        words[0][:-1]: int(words[1]) << 10
        for words in map(str.split, _text(path).splitlines())
        if len(words) == 3 and words[2] == "kB"
    }


def _delta(pid: int, seen: Seen, of_ended: Counter[str]) -> Counter[str]:
    """What was read since the last sample, without what reaped children brought."""
    now: Counter[str] = Counter()
    for line in _text(f"/proc/{pid}/io").splitlines():
        name, value = line.split(": ")
        if name in COUNTERS:
            now[name] = int(value)
    new = Counter({name: now[name] - seen.io[name] for name in COUNTERS})
    if all(new[name] >= of_ended[name] for name in COUNTERS):  # else they were not reaped by waiting
        new.subtract(of_ended)
    seen.io = now
    return Counter({name: max(0, value) for name, value in new.items()})


def _title(pid: int) -> list[str]:
    try:
        return _text(f"/proc/{pid}/cmdline").rstrip("\0").split("\0")
    except OSError:
        return []


def kind_of(words: list[str]) -> str:
    """``ray::Desk`` of an actor or task whatever its method, else a script's or program's name."""
    first = words[0] if words else ""
    if first.startswith("ray::"):
        return re.sub(r"(?<=[\w)])\.\w+(\(\))?$", "", first.split(" ")[0])
    name = os.path.basename(first.split(" ")[0]) or "unnamed"
    if not name.startswith("python"):
        return name
    if "-m" in words[1:-1]:
        return f"python -m {words[words.index('-m') + 1]}"
    script = next((word for word in words[1:] if word.endswith(".py")), None)
    return "/".join(script.split("/")[-2:]) if script else "python"
