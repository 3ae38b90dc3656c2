"""Writing so that an interruption, a full disk or a second process loses nothing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

# How deep JSON may be nested: no file of ours or of transformers is half as deep, and Python recurses over it.
_DEEPEST = 50


def cache_dir() -> pathlib.Path:
    """The package's own directory for what can be made again: in $XDG_CACHE_HOME, else in `~/.cache`."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache", "acip_kernels")


def write_text(path, text: str) -> None:
    """Write a file in one step: readers see the old content or the new, never a part."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def write_json(path, value) -> None:
    """`write_text` of `value` as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_tensors(path, tensors: dict, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file in one step."""
    from safetensors.torch import save_file

    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, name, metadata)
        _sync(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException as error:
        pathlib.Path(name).unlink(missing_ok=True)
        # safetensors reports a full disk as its own kind of error.
        if type(error).__name__ == "SafetensorError":
            raise OSError(f"cannot write {path}: {error}") from error
        raise


@contextlib.contextmanager
def new_directory(path, *, overwrite: bool = False):
    """A temporary directory beside `path` to write into, which becomes `path` when the block ends well.

    An earlier directory of that name is replaced only if `overwrite`, and only then; after an error it is as it
    was, and nothing is left of the new one. Of two processes that write the same directory one wins, whole; without
    `overwrite` the other gets an error. A process that is killed leaves its unfinished `.NAME.…` beside `path`. Raises
    `FileExistsError` for a directory that is not empty, and for a file.
    """
    path = pathlib.Path(path).resolve()  # behind a link, its target is replaced; "." gets a name
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; give a directory")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise FileExistsError(f"{path} exists and is not empty; give another directory or allow overwriting")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = pathlib.Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield fresh
        os.chmod(fresh, 0o777 & ~_umask())
        for file in fresh.rglob("*"):
            if file.is_file():
                _sync(file)
        if overwrite and path.exists():
            old = _replace_directory(fresh, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            try:
                os.replace(fresh, path)  # an empty directory is replaced, another is not
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise FileExistsError(f"{path} was written by another process in the meantime") from None
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _replace_directory(fresh: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Put the directory `fresh` in the place of `path`; where the old one is now."""
    if _exchange(fresh, path):
        return fresh
    old = fresh.with_name(f"{fresh.name}.old")
    os.replace(path, old)
    try:
        os.replace(fresh, path)
    except BaseException:
        os.replace(old, path)
        raise
    return old


def _exchange(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Swap two directories in one step, so that a kill finds either; False where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def read_tensors(path, names=None) -> dict:
    """The tensors of a safetensors file. Raises `ValueError`, naming the file, for one that is corrupt."""
    with open_tensors(path) as file:
        return {name: read_tensor(file, path, name) for name in (names if names is not None else file.keys())}


@contextlib.contextmanager
def open_tensors(path):
    """A safetensors file to read from. Raises `ValueError`, naming the file, for one that is missing or corrupt."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    with file:
        yield file


def read_tensor(file, path, name):
    """One tensor of an open safetensors file. Raises `ValueError`, naming file and tensor, if it cannot be had."""
    from safetensors import SafetensorError

    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path}: tensor {name!r} cannot be read: {error}") from None


def read_json(path) -> dict:
    """A JSON object. Raises `ValueError`, naming the file, if it is none."""
    path = pathlib.Path(path)
    try:
        value = json.loads(path.read_bytes(), object_pairs_hook=_without_repetition)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    level: list[Any] = [value]
    for _ in range(_DEEPEST):
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, dict | list)]  # fmt: skip
    if level:
        raise ValueError(f"{path} is nested more than {_DEEPEST} deep")
    return value


def _without_repetition(pairs: list[tuple]) -> dict:
    # The last of two would win, and whoever looked at the first saw something else.
    value: dict = {}
    for name, inner in pairs:
        if name in value:
            raise ValueError(f"{name!r} occurs twice in one object")
        value[name] = inner
    return value


def remove_unfinished(path) -> None:
    """Delete what a killed process left of writing the file `path`, which nobody else may be writing now."""
    path = pathlib.Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.????????"):
        left.unlink()


def _sync(path) -> None:
    """The file's content reaches the disk before its name does: a power failure leaves no empty file."""
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
