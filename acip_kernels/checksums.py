"""Whether a directory still holds what was saved: SHA-256 of its files, of weight files tensor by tensor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import files

FILE = "checksums.json"
# People write on in the one; the other cannot hold its own.
_LEFT_OUT = ("README.md", FILE)
_HEADER = "header"
# Read at a time.
_BLOCK = 2**24


def write(directory: str | os.PathLike) -> None:
    """Write checksums.json, of all other files in `directory` but README.md.

    Of a safetensors file that is the digest of its header and of each tensor, so that what is damaged has a name.
    Nothing reads it but `verify`: a digest costs as much time as reading at 2 GB/s for each core, and a size that is
    cut from an elastic checkpoint reads slices of its file alone.
    """
    directory = pathlib.Path(directory)
    found: dict[str, str | dict] = {}
    for file in sorted(directory.iterdir()):
        if file.is_file() and file.name not in _LEFT_OUT:
            with _opened(file) as (handle, size):
                holds_tensors = file.suffix == ".safetensors"
                found[file.name] = _digests(handle, _parts(handle)) if holds_tensors else _digest(handle, (0, size))
    files.write_json(directory / FILE, {"algorithm": "sha256", "files": found})


def verify(path: str | os.PathLike, *, progress: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Read all of a directory, and compare it with what was saved there.

    Args:
        path: an elastic or materialized checkpoint, or an export, with the checksums.json that was written with it.
        progress: called with `(done, total)`, in bytes.

    Returns:
        How many `files`, `tensors` and `bytes` are as they were saved.

    Raises:
        ValueError: the names of the files and tensors that are not, that are missing, or that are there besides; or
            no checksums.json.
    """
    directory = pathlib.Path(path)
    expected = _expected(directory)
    present = {name for name in expected if (directory / name).is_file()}
    damaged = [f"{name} is missing" for name in expected if name not in present]
    # A weight file from elsewhere would be loaded, or mixed in.
    strange = {file.name for file in directory.glob("*.safetensors")} - set(expected)
    damaged += [f"{name} was not saved with the others" for name in sorted(strange)]
    total, done, tensors = sum((directory / name).stat().st_size for name in present), 0, 0
    for name in sorted(present):
        with _opened(directory / name) as (handle, size):
            wrong, held = _compare(handle, size, expected[name])
        damaged += [f"{name}: {what}" if what else name for what in wrong]
        tensors, done = tensors + held, done + size
        if progress is not None:
            progress(done, total)
    if damaged:
        more = f", and {len(damaged) - 20} more" if len(damaged) > 20 else ""
        raise ValueError(
            f"{directory} is not as it was saved: {'; '.join(damaged[:20])}{more}. Copy it again from where it is whole"
        )
    return {"files": len(present), "tensors": tensors, "bytes": done}


def _expected(directory: pathlib.Path) -> dict[str, Any]:
    """checksums.json, checked."""
    file = directory / FILE
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if not file.exists():
        raise ValueError(
            f"{directory} has no {FILE}: it was saved by another program, or by a version that wrote none. What "
            "acip_kernels.save writes has one"
        )
    fields = files.read_json(file)
    expected = fields.get("files")
    if fields.get("algorithm") != "sha256" or not isinstance(expected, dict):
        raise ValueError(f"{file} holds no SHA-256 of files: a newer acip_kernels may know it")
    for name, digests in expected.items():
        tensors = digests.get("tensors") if isinstance(digests, dict) else {}
        if pathlib.PurePath(name).name != name or "\0" in name:
            raise ValueError(f"{file}: {name!r} is no file of this directory")
        if not isinstance(digests, str | dict) or not isinstance(tensors, dict):
            raise ValueError(f"{file}: the digests of {name!r} are none")
    return expected


def _compare(handle: int, size: int, expected: str | dict) -> tuple[list[str], int]:
    """What of a file is not as it was saved, "" for the file as a whole; and how many tensors it holds."""
    if isinstance(expected, str):
        return ([] if _digest(handle, (0, size)) == expected else [""]), 0
    if _digest(handle, (0, _header_end(handle))) != expected.get(_HEADER):
        return ["its header, which says where the tensors are"], 0  # so they cannot be looked at
    try:
        parts = _parts(handle)
    except ValueError:
        return ["its header, which is that of no safetensors file"], 0
    found = _digests(handle, parts)["tensors"]
    wrong = [f"tensor {name!r}" for name in found if found[name] != expected["tensors"].get(name)]
    wrong += [f"tensor {name!r} is missing" for name in expected["tensors"] if name not in found]
    end = max(stop for _, stop in parts.values())
    if size > end:
        wrong.append(f"{size - end} bytes after the last tensor")
    return wrong, len(found)


def _digests(handle: int, parts: dict[str, tuple[int, int]]) -> dict[str, Any]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # reading and hashing let the other threads run
        found = dict(zip(parts, pool.map(lambda part: _digest(handle, part), parts.values())))
    return {_HEADER: found.pop(_HEADER), "tensors": found}


def _parts(handle: int) -> dict[str, tuple[int, int]]:
    """Where the header of a safetensors file, and the data of each of its tensors, start and end; else `ValueError`."""
    size, start = os.fstat(handle).st_size, _header_end(handle)
    parts = {_HEADER: (0, start)}
    try:
        header = json.loads(os.pread(handle, min(start, size) - 8, 8))
        header.pop("__metadata__", None)
        for name, about in header.items():
            a, b = about["data_offsets"]
            if type(a) is not int or type(b) is not int or not 0 <= a <= b <= size:
                raise ValueError(f"{name} is at {a} to {b} of {size} bytes")
            parts[name] = start + a, start + b
    except (AttributeError, KeyError, RecursionError, TypeError) as error:
        raise ValueError(f"not as such headers are: {error!r}") from error
    return parts


def _header_end(handle: int) -> int:
    return 8 + int.from_bytes(os.pread(handle, 8, 0), "little")


def _digest(handle: int, part: tuple[int, int]) -> str:
    """Of what there is of a part: a file that is cut off has less."""
    at, stop = part
    digest = hashlib.sha256()
    while block := os.pread(handle, min(_BLOCK, stop - at), at):
        digest.update(block)
        at += len(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(file: pathlib.Path) -> Iterator[tuple[int, int]]:
    """A file to read from, and how many bytes it has."""
    with open(file, "rb") as opened:
        yield opened.fileno(), os.fstat(opened.fileno()).st_size
