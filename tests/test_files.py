"""Writing in one step: whatever goes wrong, there is the old content or the new, and no rubbish."""

import errno
import json
import os
import pathlib
import stat

import pytest
import torch

from acip_kernels import files

NAMES = ["plain", "with space", "größe×λ 模型", ".hidden", "-dash"]

WRITERS = {
    "text": lambda path, number: files.write_text(path, f"content {number}\n"),
    "json": lambda path, number: files.write_json(path, {"λ": number}),
    "tensors": lambda path, number: files.write_tensors(path, {"t": torch.full((3,), float(number))}),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_read(name, tmp_path):
    path = tmp_path / "new" / name
    files.write_text(path, "größe\n")
    assert path.read_text(encoding="utf-8") == "größe\n"
    value = {"ranks": {"a.b": 3}, "λ": [1.5, None, "×"]}
    files.write_json(path, value)
    assert files.read_json(path) == value
    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.ones(0, 4, dtype=torch.bfloat16)}
    files.write_tensors(path, tensors, {"made": "here"})
    read = files.read_tensors(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in tensors.items())
    assert list(files.read_tensors(path, ["b"])) == ["b"]
    assert os.listdir(path.parent) == [name]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_permissions_are_those_of_any_new_file(write, tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path / "file", 1)
        with files.new_directory(tmp_path / "directory"):
            pass
        assert files._umask() == 0o027  # asking for it does not change it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == 0o750


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_failing_write_leaves_the_old_content(write, error, there, tmp_path, monkeypatch):
    if there:
        write(tmp_path / "file", 1)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}

    def fail(*args):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write(tmp_path / "file", 2)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


def test_a_full_disk_is_an_oserror_whatever_safetensors_calls_it(tmp_path, monkeypatch):
    import safetensors.torch

    def full(tensors, name, metadata):
        pathlib.Path(name).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="cannot write .*file.*No space left"):
        files.write_tensors(tmp_path / "file", {"t": torch.ones(3)})
    assert os.listdir(tmp_path) == []


# ---- directories


def content(path):
    return {file.relative_to(path).as_posix(): file.read_text() for file in path.rglob("*") if file.is_file()}


def fill(path, text, **options):
    with files.new_directory(path, **options) as fresh:
        (fresh / "sub").mkdir()
        (fresh / "sub" / "file").write_text(text)


@pytest.mark.parametrize("name", NAMES)
def test_a_directory_appears_whole_and_is_replaced_whole(name, tmp_path):
    path = tmp_path / "new" / name
    with files.new_directory(path) as fresh:
        (fresh / "other").write_text("1")
        assert not path.exists()
    fill(path, "2", overwrite=True)
    assert content(path) == {"sub/file": "2"}
    assert os.listdir(path.parent) == [name]


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "1")
    assert content(tmp_path / "empty") == {"sub/file": "1"}


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    fill(tmp_path / "target", "1")
    (tmp_path / "link").symlink_to("target")
    fill(tmp_path / "link", "2", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "target") == {"sub/file": "2"}
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_the_working_directory_has_a_name(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fill(".", "1")
    assert content(tmp_path / "here") == {"sub/file": "1"}
    assert os.listdir(tmp_path) == ["here"]


def test_what_is_there_is_refused(tmp_path):
    fill(tmp_path / "full", "1")
    (tmp_path / "file").write_text("2")
    before = content(tmp_path)
    for name, options, message in (
        ("full", {}, "full exists and is not empty"),
        ("file", {}, "file is a file"),
        ("file", {"overwrite": True}, "file is a file"),
    ):
        with pytest.raises(FileExistsError, match=message):
            fill(tmp_path / name, "3", **options)
    assert content(tmp_path) == before


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_in_the_block_leaves_the_old_directory(error, there, tmp_path):
    if there:
        fill(tmp_path / "model", "1")
    before = content(tmp_path)
    with pytest.raises(type(error)):
        with files.new_directory(tmp_path / "model", overwrite=True) as fresh:
            (fresh / "half").write_text("2")
            raise error
    assert content(tmp_path) == before
    assert os.listdir(tmp_path) == (["model"] if there else [])


@pytest.mark.parametrize("step", [1, 2])
def test_an_error_between_the_two_renames_brings_the_old_one_back(step, tmp_path, monkeypatch):
    fill(tmp_path / "model", "1")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)  # as where the system has no such call
    replace, calls = os.replace, []

    def fail(source, target):
        calls.append(source)
        if len(calls) == step:
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        fill(tmp_path / "model", "2", overwrite=True)
    assert content(tmp_path) == {"model/sub/file": "1"}
    assert os.listdir(tmp_path) == ["model"]


# ---- reading


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "missing"),
        (b"", "not JSON"),
        (b'{"a": ', "not JSON"),
        (b"\xff\xfe{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
)
def test_json_that_is_none_is_named(data, message, tmp_path):
    path = tmp_path / "config.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=f"config.json.* {message}"):
        files.read_json(path)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 7,
        (2**62).to_bytes(8, "little") + b"{}",  # a header larger than any file
        header(t={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),  # no data
        header(t={"dtype": "F32", "shape": [2**40], "data_offsets": [0, 8]}) + b"\0" * 8,
        header(t={"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}) + b"\0" * 8,
        header(t={"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 8,
        header(t={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}) + b"\0" * 9,  # more than it says
        b"PK\x03\x04" + b"\0" * 100,
    ],
)
def test_tensors_that_are_none_are_named(data, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        files.read_tensors(path)


def test_a_tensor_or_file_that_is_missing_is_named(tmp_path):
    files.write_tensors(tmp_path / "a.safetensors", {"t": torch.ones(2)})
    with pytest.raises(ValueError, match="a.safetensors: tensor 'u'"):
        files.read_tensors(tmp_path / "a.safetensors", ["u"])
    with pytest.raises(ValueError, match="b.safetensors is missing"):
        files.read_tensors(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="safetensors"):
        files.read_tensors(tmp_path)
