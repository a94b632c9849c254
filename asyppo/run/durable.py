"""Files and directories that are whole or not there, whenever the process dies.

What is written under a temporary name, flushed to the disk and renamed appears at once or not at all. A directory that
is *sealed* carries a manifest with the size and checksum of each of its files, so that what was damaged later shows.
Temporary names begin with a dot; ``sweep`` removes those that a killed process left.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
TEMPORARY = (".partial", ".removed")


class WriteError(RuntimeError):
    """Something could not be written, on a full disk for example. The message names it and the reason."""

    exit_status = 1


@contextmanager
def writing(what: Path) -> Iterator[None]:
    """Turn whatever the libraries raise when a write inside fails into one WriteError that names ``what``."""
    from safetensors import SafetensorError
    from torch.distributed.checkpoint import CheckpointException

    try:
        yield
    except (OSError, SafetensorError, CheckpointException, RuntimeError) as error:
        raise WriteError(f"cannot write {what}: {_reason(error, what)}") from error


def _reason(error: BaseException, what: Path) -> str:
    """Say why in a few words: the system's if they can be found, else the disk's free space and the error's text."""
    for wrapped, _ in getattr(error, "failures", {}).values():  # of torch.distributed.checkpoint, by rank
        return _reason(wrapped, what)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    free = shutil.disk_usage(next(path for path in (what, *what.parents) if path.exists())).free
    text = " ".join(str(error).split())
    return f"{free / 2**20:.1f} MiB are free; {text[:200]}"


def flush(path: Path) -> None:
    """Wait until what is written to a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Flush every file and directory in ``directory``, and itself."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            flush(Path(folder, name))
        flush(Path(folder))


def write_text(path: Path, text: str) -> None:
    """Write a file, replacing what is there, at once."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    flush(path.parent)


def as_json(value: Any) -> Any:
    """Return ``value``, plain data, as JSON can hold it: NaN and infinity become None."""
    if isinstance(value, dict):
        return {key: as_json(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def json_lines(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield plain ``rows`` as lines of JSON, which knows no NaN and no infinity: they become null."""
    for row in rows:
        try:
            line = json.dumps(row, allow_nan=False)
        except ValueError:  # seldom: rows are long
            line = json.dumps(as_json(dict(row)), allow_nan=False)
        yield line + "\n"


def seal(directory: Path) -> None:
    """Write the manifest of ``directory``, and flush everything in it."""
    manifest = {name: {"size": size, "blake2b": digest} for name, (size, digest) in _contents(directory).items()}
    (directory / MANIFEST).write_text(json.dumps({"files": manifest}, indent=1))
    flush_tree(directory)


def damage(directory: Path) -> str | None:
    """Return what is wrong with a sealed directory, in a few words, or None. Files that it did not have are no
    damage."""
    try:
        expected = json.loads((directory / MANIFEST).read_text())["files"]
        sizes = {name: (entry["size"], entry["blake2b"]) for name, entry in expected.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, (size, _) in sizes.items():  # before any file is read
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
    try:
        found = _contents(directory, list(sizes))
    except OSError as error:
        return f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
    return next((f"{name} has another checksum" for name in sizes if found[name] != sizes[name]), None)


def _contents(directory: Path, names: list[str] | None = None) -> dict[str, tuple[int, str]]:
    """Size and checksum of files by their path in ``directory``: of ``names``, or of all but the manifest."""
    if names is None:
        paths = (path for path in sorted(directory.rglob("*")) if path.is_file() and path != directory / MANIFEST)
        names = [path.relative_to(directory).as_posix() for path in paths]

    def measure(name: str) -> tuple[int, str]:
        with open(directory / name, "rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
            return file.tell(), digest

    with ThreadPoolExecutor() as pool:  # hashing leaves Python's lock
        return dict(zip(names, pool.map(measure, names), strict=True))


def publish(partial: Path, final: Path) -> None:
    """Give a flushed directory its name. One that has it already goes away just before."""
    if final.exists():
        remove(final)
    partial.rename(final)
    flush(final.parent)


def remove(directory: Path) -> None:
    """Delete a directory; its name is gone at once, and no half of it stays under it."""
    removed = directory.with_name(f".{directory.name}.removed")
    if removed.exists():
        shutil.rmtree(removed)
    directory.rename(removed)
    shutil.rmtree(removed)


def sweep(directory: Path) -> None:
    """Remove the temporary files and directories in ``directory`` that a killed process left."""
    for path in directory.iterdir():
        if path.name.startswith(".") and path.name.endswith(TEMPORARY):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
