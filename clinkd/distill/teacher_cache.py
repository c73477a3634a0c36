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
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from clinkd import storage

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from clinkd.distill.forms import Form

FORMAT = 1
"""Of parts; another number makes every store anew."""
INDEX, PLACE, HEAD, ABOUT = "index.parquet", "store.json", "head.safetensors", "teacher.json"
LIGHT = ("key", "answer", "source", "reason", "tokens", "p1", "margin", "entropy", "off")
"""Columns of a part beside its form's; ``reason``: why a pseudo-label was refused, ``off``: Form.pack's."""
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

    def open(self, head: Tensor | None, about: Mapping[str, Any]) -> None:
        """Makes the store where it is not there: the teacher's head (None: the form needs none)."""
        storage.make_folder(self.folder)
        if head is not None and storage.stamp(self.folder / HEAD) is None:
            from safetensors.torch import save

            storage.write_whole(self.folder / HEAD, save({"head": head.detach().cpu().clone()}))
        storage.write_whole(self.folder / ABOUT, json.dumps(dict(about), indent=1) + "\n")

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
            place = {"part": pa.array([name] * len(table)), "row": pa.array(range(len(table)), pa.int32())}
            for column, values in place.items():
                table = table.append_column(column, values)
            tables.append(table)
        if not tables:
            return pa.table({key: pa.array([], kind) for key, kind in _placed_schema().items()})
        return pa.concat_tables(tables)

    def known(self) -> set[str]:
        return set(self.light().column("key").to_pylist())


def _light_schema() -> dict[str, Any]:
    import pyarrow as pa

    text = dict.fromkeys(("key", "answer", "source", "reason"), pa.string())
    numbers = dict.fromkeys(("p1", "margin", "entropy", "off"), pa.float32())
    kinds = text | {"tokens": pa.int32()} | numbers
    return {name: kinds[name] for name in LIGHT}


def _placed_schema() -> dict[str, Any]:
    import pyarrow as pa

    return _light_schema() | {"part": pa.string(), "row": pa.int32()}


def write_index(folder: Path, samples: Iterable[tuple[str, str, str]], store: Store, form: Form) -> pa.Table:
    """The list of a stage's samples, (sample, task, key) each, in their order; and where the store is.

    Returns:
        Its table: ``sample, task``, the light columns, ``part, row``.

    Raises:
        ValueError: a sample that is in no part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    light = store.light()
    first: dict[str, int] = {}
    for row, key in enumerate(light.column("key").to_pylist()):
        first.setdefault(key, row)
    listed = sorted(samples)
    missing = [sample for sample, _, key in listed if key not in first]
    if missing:
        raise ValueError(
            f"teacher cache: {store.folder} lacks {len(missing)} samples, {missing[0]} among them"
        )
    table = light.take([first[key] for _, _, key in listed])
    for at, name in enumerate(("sample", "task")):
        table = table.add_column(at, name, pa.array([row[at] for row in listed], pa.string()))
    pq.write_table(table, folder / INDEX)
    parts = sorted(set(table.column("part").to_pylist()))
    sizes = {part: _size(store.folder / part) for part in parts}
    place = {"folder": str(storage.absolute(store.folder)), "form": form.name, "k": form.k,
             "vocabulary": form.vocabulary, "endpoint": storage.endpoint(), "sizes": sizes}  # fmt: skip
    storage.write_whole(folder / PLACE, json.dumps(place) + "\n")
    return table


def _size(path: Path) -> int | None:
    """Bytes of a file; None where there is none."""
    found = storage.stamp(path)
    return None if found is None else int(found.partition(":")[0])


class _Place(NamedTuple):
    part: str
    row: int


class TeacherCache:
    """Reads what a stage's list names: answers, margins and states by sample.

    Args:
        folder: holds ``INDEX`` and ``PLACE``. scratch: where parts of a bucket are brought to; only for one.

    Raises:
        FileNotFoundError: the store is gone. ValueError: a part of it is not as long as it was written.
    """

    def __init__(self, folder: Path, scratch: Path | None = None) -> None:
        import pyarrow.parquet as pq

        from clinkd.distill.forms import Form

        place = json.loads((folder / PLACE).read_text())
        storage.configure(place.pop("endpoint"))
        self._sizes: dict[str, int] = place.pop("sizes")
        self.store, self.scratch = storage.locate(place.pop("folder")), scratch
        self.form = Form(place.pop("form"), **place)
        table = pq.read_table(folder / INDEX)
        good = table.filter(table.column("reason").is_null())
        names = good.column("sample").to_pylist()
        places = zip(good.column("part").to_pylist(), good.column("row").to_pylist(), strict=True)
        self._places = dict(zip(names, map(_Place._make, places), strict=True))
        self.answers = dict(zip(names, good.column("answer").to_pylist(), strict=True))
        self.margins = dict(zip(names, good.column("margin").to_pylist(), strict=True))
        self.head = None if self.form.name == "topk" else self._head()  # [Vt, Ht] float32
        self._open: dict[str, Any] = {}

    def __contains__(self, sample: str) -> bool:
        return sample in self._places

    def read(self, samples: Sequence[str]) -> dict[str, Tensor]:
        """What the loss takes of the answer tokens, one sample after the other; see ``Form.unpack``."""
        kept: dict[str, list[bytes]] = {name: [] for name in self.form.columns}
        for sample in samples:
            part, row = self._places[sample]
            columns = self._columns(part)
            for name, values in kept.items():
                values.append(columns[name][row].as_buffer())
        width = 0 if self.head is None else self.head.shape[1]
        return self.form.unpack(kept, width)

    def _columns(self, part: str) -> Any:
        if part not in self._open:
            import pyarrow as pa

            table = pa.ipc.open_file(pa.memory_map(str(self._local(part)))).read_all()
            self._open[part] = {name: table.column(name).chunk(0) for name in self.form.columns}
        return self._open[part]

    def _head(self) -> Tensor:
        from safetensors.torch import load_file

        return load_file(self._local(HEAD))["head"].float()

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
        if self.scratch is None:
            raise ValueError(f"teacher cache: {path} lies in a bucket; a folder for its copies is wanted")
        near = self.scratch / name
        if not near.exists():
            with path.open("rb") as far, storage.whole(near) as file:
                shutil.copyfileobj(far, file, 1 << 20)
        return near
