"""The teacher asked once: what it says at every answer token, kept for every epoch and every trial.

Decisions:
- The store of a teacher is a folder on a disk or in a bucket, named by what its rows follow from: the
  weights, the processor and tokenizer, and the form they are kept in. A row is named by the sample's content
  (images, question, answer, or how the teacher was asked for one): another split, share or run finds what is
  there, and of changed data only what changed is asked for again.
- A part is one Arrow file, written whole and never changed: readers map it into memory, and a build that was
  killed goes on with the rows that are in no part. Of two builders at once both may write a row; one counts.
- What a stage learns from is a list (``INDEX``): each sample's answer, confidence and place in the store.
- Answers are patient data: they are in the store and the list alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinkd import storage
from clinkd.data.lookup import Lookup

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from clinkd.distill.forms import Form

FORMAT = 1
"""Of parts; another number makes every store anew."""
INDEX, PLACE, HEAD, ABOUT = "index.parquet", "store.json", "head.safetensors", "teacher.json"
LIGHT = ("key", "answer", "source", "reason", "tokens", "p1", "margin", "entropy", "off")
"""Columns of a part beside its form's; ``reason``: why a pseudo-label was refused, ``off``: Form.pack's."""
PART_BYTES = 64 << 20
"""Of states, after which a part is written."""
OPEN = 64
"""Parts that a reader keeps open."""
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")


def sample_key(images: Sequence[bytes], question: str, answer: str | Mapping[str, Any]) -> str:
    """Names a row by its content; ``answer``: the text, or how the teacher was asked for one."""
    seen = [hashlib.sha256(image).hexdigest() for image in images]
    text = json.dumps([seen, question, answer], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def teacher_key(model: Path, settings: Mapping[str, Any]) -> str:
    """Names a store by the teacher's files and ``settings`` (form, type of computation, limits of pixels)."""
    files = [path for path in sorted(model.iterdir()) if path.is_file() and path.suffix in _MODEL_FILES]
    seen = {path.name: storage.sha256(path) for path in files}
    text = json.dumps([FORMAT, seen, dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
    """A teacher's parts in a folder.

    Args:
        root: folder or URI that holds stores. key: ``teacher_key``.
    """

    def __init__(self, root: str | Path, key: str) -> None:
        self.folder = storage.locate(root) / key

    def open(self, about: Mapping[str, Any]) -> None:
        """Makes the store where it is not there."""
        storage.make_folder(self.folder)
        storage.write_whole(self.folder / ABOUT, json.dumps(dict(about), indent=1) + "\n")

    def keep_head(self, head: Tensor) -> None:
        """Writes the teacher's head [Vt, Ht], once, in its own precision."""
        if storage.stamp(self.folder / HEAD) is None:
            from safetensors.torch import save

            storage.write_whole(self.folder / HEAD, save({"head": head.detach().cpu().clone()}))

    def write(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
        """Writes a part; its name follows from the rows' keys, so that a task done twice leaves one."""
        import pyarrow as pa

        keys = "".join(sorted(row["key"] for row in rows))
        name = hashlib.sha256(keys.encode()).hexdigest()[:32] + ".arrow"
        kinds = _light_schema() | {column: pa.large_binary() for column in columns}
        table = pa.table({key: pa.array([row[key] for row in rows], kind) for key, kind in kinds.items()})
        with storage.whole(self.folder / name) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return name

    def parts(self) -> list[str]:
        return [name for name in storage.names(self.folder) if name.endswith(".arrow")]

    def light(self) -> pa.Table:
        """Light columns of all parts, with ``part`` and ``row``; the first of rows that are there twice."""
        import pyarrow as pa

        wanted = list(_light_schema())
        tables = []
        for name in self.parts():
            with (self.folder / name).open("rb") as file:
                options = pa.ipc.IpcReadOptions(included_fields=list(range(len(wanted))))
                table = pa.ipc.open_file(file, options=options).read_all()
            rows = pa.array(np.arange(len(table), dtype=np.int32))
            place = {"part": pa.repeat(name, len(table)), "row": rows}
            for column, values in place.items():
                table = table.append_column(column, values)
            tables.append(table)
        if not tables:
            return pa.table({key: pa.array([], kind) for key, kind in _placed_schema().items()})
        return pa.concat_tables(tables)

    def known(self) -> pa.ChunkedArray:
        """The keys of all rows."""
        return self.light().column("key")


class Part:
    """Rows on their way into a store; a part is written when it is large enough, and at the end."""

    def __init__(self, store: Store, columns: Sequence[str]) -> None:
        self.store, self.columns = store, columns
        self.keys: set[str] = set()  # of all that were added
        self._rows: list[Mapping[str, Any]] = []
        self._size = 0

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._rows += rows
        self.keys.update(row["key"] for row in rows)
        self._size += sum(len(row[column]) for row in rows for column in self.columns)
        if self._size >= PART_BYTES:
            self.write()

    def write(self) -> None:
        if self._rows:
            self.store.write(self._rows, self.columns)
        self._rows, self._size = [], 0


def _light_schema() -> dict[str, Any]:
    import pyarrow as pa

    text = dict.fromkeys(("key", "answer", "source", "reason"), pa.string())
    numbers = dict.fromkeys(("p1", "margin", "entropy", "off"), pa.float32())
    kinds = text | {"tokens": pa.int32()} | numbers
    return {name: kinds[name] for name in LIGHT}


def _placed_schema() -> dict[str, Any]:
    import pyarrow as pa

    return _light_schema() | {"part": pa.string(), "row": pa.int32()}


def write_index(folder: Path, asked: pa.Table, store: Store, form: Form) -> pa.Table:
    """The list of a stage's samples in their order, and where the store is.

    Args:
        asked: ``sample, task, key`` of each.

    Returns:
        Its table: ``sample, task``, the light columns, ``part, row``.

    Raises:
        ValueError: a sample that is in no part.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    light, listed = store.light(), asked.sort_by("sample")
    places = pc.index_in(listed.column("key"), value_set=light.column("key").combine_chunks())  # the first
    if places.null_count:
        missing = listed.filter(places.is_null()).column("sample")
        raise ValueError(
            f"teacher cache: {store.folder} lacks {len(missing)} samples, {missing[0].as_py()} among them"
        )
    table = light.take(places)
    for at, name in enumerate(("sample", "task")):
        table = table.add_column(at, name, listed.column(name))
    pq.write_table(table, folder / INDEX)
    parts = sorted(table.column("part").unique().to_pylist())
    sizes = {part: _size(store.folder / part) for part in parts}
    place = {"folder": str(storage.absolute(store.folder)), "form": form.name, "k": form.k,
             "vocabulary": form.vocabulary, "endpoint": storage.endpoint(), "sizes": sizes}  # fmt: skip
    storage.write_whole(folder / PLACE, json.dumps(place) + "\n")
    return table


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    found = storage.stamp(path)
    return None if found is None else int(found.partition(":")[0])


class TeacherCache:
    """Reads what a stage's list names: answers, margins and states by sample.

    Args:
        folder: holds ``INDEX`` and ``PLACE``. copies: folder of this node where parts of a bucket are brought
            to; None: one that all its processes share.

    Raises:
        FileNotFoundError: the store is gone. ValueError: a part of it is not as long as it was written.
    """

    def __init__(self, folder: Path, copies: Path | None = None) -> None:
        import pyarrow.parquet as pq

        from clinkd.distill.forms import Form

        place = json.loads((folder / PLACE).read_text())
        storage.configure(place.pop("endpoint"))
        self._sizes: dict[str, int] = place.pop("sizes")
        self.store = storage.locate(place.pop("folder"))
        self._copies = copies
        self.form = Form(place.pop("form"), **place)
        table = pq.read_table(folder / INDEX, columns=["sample", "answer", "margin", "reason", "part", "row"])
        good = table.filter(table.column("reason").is_null())
        self.samples, self._answers = good.column("sample"), good.column("answer")
        self.margins = good.column("margin").to_numpy().astype(np.float32)
        parts = good.column("part").combine_chunks().dictionary_encode()
        self._parts, self._part = parts.dictionary.to_pylist(), parts.indices.to_numpy()
        self._row = good.column("row").to_numpy()
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self.samples)

    def __contains__(self, sample: str) -> bool:
        return bool(self.find([sample])[0] >= 0)

    @cached_property
    def _names(self) -> Lookup:
        return Lookup(self.samples)

    def find(self, samples: Sequence[str]) -> np.ndarray:
        """Where each sample stands in the list, int64; -1: it is not there, or was refused."""
        return self._names.rows(samples)

    def answer(self, place: int) -> str:
        """What the student is to say of the sample at a place of the list."""
        return str(self._answers[place].as_py())

    def raw(self, places: Sequence[int]) -> dict[str, bytes]:
        """What is kept of the answer tokens of some samples, one after the other; by column of the form."""
        kept: dict[str, list[Any]] = {name: [] for name in self.form.columns}
        for place in places:
            columns = self._columns(self._parts[self._part[place]])
            for name, values in kept.items():
                values.append(columns[name][int(self._row[place])].as_buffer())
        return {name: b"".join(values) for name, values in kept.items()}

    def unpack(self, kept: Mapping[str, bytes]) -> dict[str, Tensor]:
        """What the loss takes of ``raw``; see ``Form.unpack``."""
        return self.form.unpack({name: [value] for name, value in kept.items()}, self.width)

    def read(self, samples: Sequence[str]) -> dict[str, Tensor]:
        """``unpack`` of samples by name.

        Raises:
            KeyError: one that is not there.
        """
        places = self.find(samples)
        if len(places) and places.min() < 0:
            raise KeyError(f"teacher cache: sample {samples[int(places.argmin())]} is not in it")
        return self.unpack(self.raw(places.tolist()))

    def _columns(self, part: str) -> Any:
        if part not in self._open:
            import pyarrow as pa

            table = pa.ipc.open_file(pa.memory_map(str(self._local(part)))).read_all()
            self._open[part] = {name: table.column(name).chunk(0) for name in self.form.columns}
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(part)
        return self._open[part]

    @cached_property
    def head(self) -> Tensor | None:
        """[Vt, Ht] float32; None where the form needs none."""
        from safetensors.torch import load_file

        return None if self.form.name == "topk" else load_file(self._local(HEAD))["head"].float()

    @cached_property
    def width(self) -> int:
        """Of the teacher's states; 0 where none are kept. Reads the head's shape alone."""
        from safetensors import safe_open

        if self.form.name == "topk":
            return 0
        with safe_open(self._local(HEAD), "pt") as file:
            return int(file.get_slice("head").get_shape()[1])

    def _local(self, name: str) -> Path:
        """A file of the store as one that can be mapped."""
        path = self.store / name
        size, mend = _size(path), "delete it and the stage label's folder of artifacts, and run again"
        if size is None:
            raise FileNotFoundError(f"teacher cache: {path} is gone; {mend}")
        if size != self._sizes.get(name, size):
            raise ValueError(
                f"teacher cache: {path} has {size} bytes, {self._sizes[name]} were written; {mend}"
            )
        if not storage.is_remote(path):
            return path
        near = (self._copies or copies_folder() / self.store.name) / name
        if not near.exists():
            near.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as far, storage.whole(near) as file:
                shutil.copyfileobj(far, file, 1 << 20)
        return near


def copies_folder() -> Path:
    """Where the processes of one user on this node share copies of a bucket's parts; no one else reads it."""
    folder = Path(tempfile.gettempdir()) / f"clinkd-copies-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if found.st_uid != os.getuid() or not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not this user's alone; remove it, or set TMPDIR to another place")
    return folder
