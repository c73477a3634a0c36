"""The Java programs behind the caption metrics: the PTB tokeniser, METEOR and SPICE, each as one process.

Decisions:
- All groups of captions go through one tokeniser run, every group a file of its own: the lexer looks ahead
  across line ends, so a group's last caption must see the end of its input as it does in the scripts.
- One METEOR process serves everything (loading its paraphrase table takes seconds); requests go in blocks
  whose answers fit a pipe, so neither side can wait for the other. A timer kills a process that does not
  answer.
- Nothing is written beside the packages' jars; text travels through a temporary directory or through pipes.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# Tokens the published tokeniser drops; brackets come lower-cased out of Java and so stay, as published.
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
# What ends a line for Python, for Java or for the lexer: inside a caption it would shift every later caption.
LINE_BREAKS = str.maketrans(dict.fromkeys("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))
_BLOCK = 128  # METEOR answers some 140 bytes a request; a pipe holds 64 KiB
_JVM = ("-XX:+UseSerialGC", "-Dfile.encoding=UTF-8")
# SPICE's serialiser reaches into these packages, closed since Java 16.
_OPENED = ("lang", "util", "io", "math", "net", "text", "util.concurrent", "lang.reflect")


class JavaError(RuntimeError):
    """A Java program that is missing, failed or did not answer; the message says which and why."""


def find_java() -> str | None:
    """The Java launcher: ``$JAVA_HOME/bin/java`` or the one on PATH."""
    home = os.environ.get("JAVA_HOME")
    return (shutil.which("java", path=str(Path(home) / "bin")) if home else None) or shutil.which("java")


@functools.cache
def java_version(java: str) -> str | None:
    """First line of ``java -version``; None when it does not start."""
    try:
        result = subprocess.run([java, "-version"], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line for line in result.stderr.decode(errors="replace").splitlines() if "version" in line]
    return lines[0].strip() if lines else None


def package_dir() -> Path:
    """Where pycocoevalcap and its jars lie.

    Raises:
        JavaError: the package is not installed.
    """
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise JavaError("the package pycocoevalcap, which holds the jars, is not installed")
    return Path(next(iter(spec.submodule_search_locations)))


def one_line(text: str) -> str:
    return text.translate(LINE_BREAKS)


def tokenise(java: str, groups: Sequence[Sequence[str]], timeout_s: float = 600) -> list[list[str]]:
    """PTB tokens of each caption, lower-cased, punctuation dropped, joined by spaces.

    Raises:
        JavaError: the tokeniser failed, or answered with another number of lines than it was given.
    """
    jar = package_dir() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    with tempfile.TemporaryDirectory(prefix="clinkd-ptb-") as folder:
        pairs = []
        for index, captions in enumerate(groups):
            text = "\n".join(one_line(caption) for caption in captions)
            (Path(folder) / f"{index}.in").write_bytes(text.encode("utf-8", "replace"))
            pairs.append(f"{index}.in {index}.out\n")
        (Path(folder) / "files").write_text("".join(pairs))
        main = (
            "edu.stanford.nlp.process.PTBTokenizer",
            "-preserveLines",
            "-lowerCase",
            "-ioFileList",
            "files",
        )
        _run([java, *_JVM, "-cp", str(jar), *main], folder, timeout_s, "the PTB tokeniser")
        return [
            _tokens(Path(folder) / f"{index}.out", len(captions)) for index, captions in enumerate(groups)
        ]


def _tokens(path: Path, expected: int) -> list[str]:
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    lines = text.split("\n")
    # Whether the last line is ended depends on what it holds.
    lines = lines[:-1] if len(lines) == expected + 1 and not lines[-1] else lines
    if expected and len(lines) != expected:
        raise JavaError(f"the PTB tokeniser gave {len(lines)} lines for {expected} captions")
    return [
        " ".join(word for word in line.rstrip().split(" ") if word not in PUNCTUATION)
        for line in lines[:expected]
    ]


def _run(command: list[str], folder: str, timeout_s: float, name: str) -> None:
    try:
        # subprocess.run kills the process when the time is over.
        result = subprocess.run(
            command, cwd=folder, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s, check=False
        )
    except OSError as error:
        raise JavaError(f"{name} did not start: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise JavaError(f"{name} did not end within {timeout_s:.0f} s") from error
    if result.returncode:
        raise JavaError(f"{name} ended with {result.returncode}: {_tail(result.stderr)}")


def _tail(stderr: bytes) -> str:
    return " ".join(stderr.decode(errors="replace").split())[-300:] or "no message"


class Meteor:
    """One METEOR 1.5 process. It starts loading at once; use as a context manager, or call `close`.

    Args:
        java: the launcher.
        timeout_s: how long one call of `score` may take, loading included, before the process is killed.

    Raises:
        JavaError: the process does not start.
    """

    def __init__(self, java: str, timeout_s: float = 1800) -> None:
        self.timeout_s = timeout_s
        # A pipe nobody reads would fill up.
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        jar = package_dir() / "meteor" / "meteor-1.5.jar"
        command = [java, *_JVM, "-Xmx2G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
            )
        except OSError as error:
            self._errors.close()
            raise JavaError(f"METEOR did not start: {error}") from error

    def __enter__(self) -> Meteor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process; may be called more than once."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            try:
                if pipe:
                    pipe.close()
            except OSError:  # unwritten bytes for a process that is gone
                pass
        self._process.wait()
        self._errors.close()

    def score(self, references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, list[float]]:
        """Corpus score and the score of each pair of tokenised captions; ``(0.0, [])`` without pairs.

        Raises:
            JavaError: the process ended, did not answer in time, or refused a line.
        """
        if not references:
            return 0.0, []
        timer = threading.Timer(self.timeout_s, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            # As published: the separator is taken out of the hypothesis only.
            lines = [
                f"SCORE ||| {reference} ||| {hypothesis.replace('|||', '').replace('  ', ' ')}"
                for reference, hypothesis in zip(references, hypotheses, strict=True)
            ]
            statistics: list[str] = []
            for start in range(0, len(lines), _BLOCK):
                block = lines[start : start + _BLOCK]
                self._write(block)
                statistics += [self._read() for _ in block]
            self._write(["EVAL" + "".join(f" ||| {line}" for line in statistics)])
            scores = [self._number() for _ in lines]
            return self._number(), scores
        finally:
            timer.cancel()

    def _write(self, lines: Sequence[str]) -> None:
        stdin = self._process.stdin
        if stdin is None:
            raise JavaError("METEOR has no input")
        try:
            stdin.write("".join(f"{one_line(line)}\n" for line in lines).encode("utf-8", "replace"))
            stdin.flush()
        except (OSError, ValueError) as error:
            raise self._ended() from error

    def _read(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else b""
        if not line:
            raise self._ended()
        return line.decode("utf-8", "replace").strip()

    def _number(self) -> float:
        line = self._read()
        try:
            return float(line)
        except ValueError:
            raise JavaError(f"METEOR answered {line[:80]!r} where a number was due") from None

    def _ended(self) -> JavaError:
        if self._errors.closed:
            return JavaError("METEOR was closed")
        self._errors.seek(0)
        return JavaError(
            f"METEOR ended or did not answer within {self.timeout_s:.0f} s: {_tail(self._errors.read())}"
        )


def spice(
    java: str, jars: Path, references: Sequence[str], hypotheses: Sequence[str], timeout_s: float = 7200
) -> list[float]:
    """SPICE F-score of each pair of tokenised captions (nan where undefined), by the jar in pycocoevalcap.

    Args:
        jars: directory with Stanford CoreNLP 3.6.0: ``stanford-corenlp-3.6.0.jar`` and ``…-models.jar``.

    Raises:
        JavaError: a jar is missing, or SPICE failed.
    """
    names = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
    missing = [name for name in names if not (jars / name).is_file()]
    if missing:
        raise JavaError(f"SPICE needs {' and '.join(missing)}, not found in {jars}")
    home = package_dir() / "spice"
    classes = os.pathsep.join(
        [str(home / "spice-1.0.jar"), *(str(jars.resolve() / n) for n in names), f"{home}/lib/*"]
    )
    opens = [part for name in _OPENED for part in ("--add-opens", f"java.base/java.{name}=ALL-UNNAMED")]
    pairs = zip(references, hypotheses, strict=True)
    items = [{"image_id": i, "test": test, "refs": [reference]} for i, (reference, test) in enumerate(pairs)]
    with tempfile.TemporaryDirectory(prefix="clinkd-spice-") as folder:
        (Path(folder) / "in.json").write_text(json.dumps(items))
        command = [java, *_JVM, "-Xmx8G", *(opens if _has_modules(java) else ()), "-cp", classes]
        command += ["edu.anu.spice.SpiceScorer", "in.json", "-out", "out.json", "-subset", "-silent"]
        _run(command, folder, timeout_s, "SPICE")
        try:
            results = json.loads((Path(folder) / "out.json").read_text())
            scores = {int(item["image_id"]): _float(item["scores"]["All"]["f"]) for item in results}
            return [scores[i] for i in range(len(items))]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise JavaError(f"SPICE left no readable scores: {error!r}") from error


def _has_modules(java: str) -> bool:
    """Java 8 ("1.8.0") does not know ``--add-opens``."""
    return '"1.' not in (java_version(java) or "")


def _float(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("nan")
