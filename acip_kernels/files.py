"""Writing so that an interruption, a full disk or a second process loses nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile


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
    was, and nothing is left of the new one. Raises `FileExistsError` for a directory that is not empty, and for a
    file.
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
        if path.exists():
            old = fresh.with_name(f"{fresh.name}.old")
            os.replace(path, old)
            try:
                os.replace(fresh, path)
            except BaseException:
                os.replace(old, path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


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
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return value


def _umask() -> int:
    # There is no way to read it without setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
