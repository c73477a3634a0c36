"""Folders and files on a disk or in a bucket, spoken of alike.

Decisions:
- A place is a path object: pathlib's on a disk, universal_pathlib's (over fsspec and s3fs) for ``s3://`` and
  every other protocol fsspec knows. Code that reads through ``open``, ``read_bytes`` and ``/`` needs no case
  for buckets.
- Credentials come from the usual chain (environment, profile, role) and are never in a configuration. The
  endpoint of an S3 that is not Amazon's is no secret: ``configure`` hands it to every worker.
- S3 requests are retried with jittered backoff by botocore (500s, throttling, dropped connections), reads of
  a body by s3fs. Listings are not cached: another worker's file has to be seen.
- A file appears whole or not at all: on a disk it is written beside and renamed, to a bucket it goes up from
  a local file in one request (or one multipart upload, which does not exist before its end).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ENDPOINT = "AWS_ENDPOINT_URL_S3"
ATTEMPTS = 10
TIMEOUT = 60
"""Seconds a request may be silent before it counts as failed and is tried again."""

_LIBRARIES = ("botocore", "aiobotocore", "aiohttp", "s3fs", "fsspec")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def outage(error: BaseException) -> bool:
    """Whether an error is one of a disk or a bucket, whichever library found it."""
    return isinstance(error, OSError) or type(error).__module__.split(".")[0] in _LIBRARIES


@contextlib.contextmanager
def _as_oserror(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or not outage(error):
            raise
        raise OSError(f"{path}: {error}") from error


def configure(endpoint: str | None) -> None:
    """Sends this process (and those it starts) to an S3 other than Amazon's; None changes nothing."""
    if endpoint:
        os.environ[ENDPOINT] = endpoint


def endpoint() -> str | None:
    """The S3 endpoint in force, None for Amazon's own."""
    return os.environ.get(ENDPOINT) or os.environ.get("AWS_ENDPOINT_URL")


def is_remote(where: str | Path) -> bool:
    return not isinstance(where, Path) and bool(_REMOTE.match(str(where)))


def locate(where: str | Path) -> Path:
    """The path object of a local path or a URI.

    Raises:
        ValueError: a protocol that fsspec does not know.
    """
    if not isinstance(where, str):
        return where
    if where.startswith("file://"):
        return Path(where.removeprefix("file://"))
    if not _REMOTE.match(where):
        return Path(where)
    from upath import UPath

    return UPath(where.rstrip("/"), **(_s3_options() if where.startswith("s3://") else {}))  # type: ignore[return-value]


def _s3_options() -> dict[str, Any]:
    retries = {"mode": "standard", "max_attempts": ATTEMPTS}
    return {
        "endpoint_url": endpoint(),
        "use_listings_cache": False,
        "config_kwargs": {"retries": retries, "connect_timeout": 10, "read_timeout": TIMEOUT},
    }


def absolute(path: Path) -> Path:
    """A path that means the same in another process's working folder."""
    return path if is_remote(path) else path.absolute()


@contextlib.contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes ``path`` when the block ends, or nothing where it raises."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix="clinkd-upload-") as scratch:
            beside = Path(scratch) / "file"
            with beside.open("wb") as file:
                yield file
            with _as_oserror(path):
                _fs(path).put_file(str(beside), _key(path))
        return
    # This process's own: tasks of a run that was killed may still live.
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes | str) -> None:
    with whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def copy_to(source: Path, path: Path) -> None:
    """A local file to a path that appears whole; into a bucket by parts where it is large."""
    if is_remote(path):
        with _as_oserror(path):
            _fs(path).put_file(str(source), _key(path))
        return
    make_folder(path.parent)
    with source.open("rb") as read, whole(path) as write:
        shutil.copyfileobj(read, write, 1 << 20)


def copy_from(path: Path, target: Path) -> None:
    """A file of a disk or bucket to a local one."""
    if is_remote(path):
        with _as_oserror(path):
            _fs(path).get_file(_key(path), str(target))
        return
    shutil.copyfile(path, target)


def read_stamped(path: Path, limit: int | None = None) -> tuple[bytes, str]:
    """A file's bytes and what tells that it is still the same file (see ``stamp``).

    Raises:
        FileNotFoundError: no such file. OSError: it cannot be read now. OverflowError: more bytes than
            ``limit``, which are not read.
    """
    if not is_remote(path):
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            _check_size(stat.st_size, limit)
            return file.read(), f"{stat.st_size}:{stat.st_mtime_ns}"
    with _as_oserror(path):
        info = _fs(path).info(_key(path))
        if info["type"] != "file":
            raise FileNotFoundError(str(path))
        _check_size(info["size"], limit)
        data = _fs(path).cat_file(_key(path), start=0, end=info["size"]) if info["size"] else b""
    if len(data) != info["size"]:
        raise OSError(f"{path}: {len(data)} bytes came of {info['size']}")
    return data, _remote_stamp(info)


def _check_size(size: int, limit: int | None) -> None:
    if limit is not None and size > limit:
        raise OverflowError(f"{size} bytes, at most {limit}")


def stamp(path: Path) -> str | None:
    """Size and time of change (in a bucket the ETag) of a file; None where there is none."""
    try:
        if is_remote(path):
            with _as_oserror(path):
                return _remote_stamp(_fs(path).info(_key(path)))
        stat = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def _remote_stamp(info: dict[str, Any]) -> str:
    return f"{info.get('size')}:{info.get('ETag') or info.get('LastModified') or info.get('mtime')}"


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def make_folder(path: Path) -> None:
    if not is_remote(path):  # a bucket has no folders
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Takes away a file or a whole folder, where there is one."""
    if is_remote(path):
        with _as_oserror(path), contextlib.suppress(FileNotFoundError):
            _fs(path).rm(_key(path), recursive=True)
    elif path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def names(folder: Path) -> list[str]:
    """Names of the files right under ``folder``, sorted; none where it is not there."""
    try:
        if is_remote(folder):
            with _as_oserror(folder):
                found = _fs(folder).ls(_key(folder), detail=True)
            return sorted(item["name"].rsplit("/", 1)[-1] for item in found if item["type"] == "file")
        return sorted(entry.name for entry in os.scandir(folder) if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []


def arrow_source(paths: list[Path]) -> tuple[list[str], Any]:
    """(paths, filesystem) as pyarrow and Ray Data take them; the filesystem is None on a disk."""
    if not paths or not is_remote(paths[0]):
        return [str(path) for path in paths], None
    import pyarrow.fs as arrow

    return [_key(path) for path in paths], arrow.PyFileSystem(arrow.FSSpecHandler(_fs(paths[0])))


def _fs(path: Any) -> Any:
    return path.fs


def _key(path: Any) -> str:
    return str(path.path)
