"""What is not as it was saved is found and named: any bit of any file but the one that people write on in."""

import json
import shutil
import sys

import pytest
import torch
import toys

import acip_kernels
from acip_kernels import checksums, cli, files, materialize, save, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of each kind; nothing may write into these."""
    root = tmp_path_factory.mktemp("models")
    result = toys.toy_result(toys.llama())
    save(result, root / "elastic", tokenizer=toys.tokenizer())
    save(result, root / "sharded", max_shard_size="40KB")
    save(result, root / "compact", compact=True, base_model="toy")
    save(materialize(result, 0.5), root / "materialized")
    save(materialize(result, 0.5, quantize="int4"), root / "quantized")
    acip_kernels.save_factors(materialize(result, 0.5), root / "factors")
    return root


KINDS = ("elastic", "sharded", "compact", "materialized", "quantized", "factors")


def copied(made, kind, tmp_path):
    return shutil.copytree(made / kind, tmp_path / "model")


def flip(file, place, bit=0):
    with open(file, "r+b") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 1 << bit]))


def layout(file):
    """`(where tensors begin, {tensor: its place and length})` of a safetensors file."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    places = {name: about["data_offsets"] for name, about in header.items() if name != "__metadata__"}
    return start, {name: (start + a, b - a) for name, (a, b) in places.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_as_it_was_saved(made, kind):
    found = verify(made / kind)
    written = [file for file in (made / kind).iterdir() if file.name not in ("README.md", "checksums.json")]
    assert found["files"] == len(written) and found["bytes"] == sum(file.stat().st_size for file in written)
    assert found["tensors"] == sum(len(layout(file)[1]) for file in written if file.suffix == ".safetensors") > 14


@pytest.mark.parametrize("kind", KINDS)
def test_one_bit_anywhere_is_found_and_named(made, kind, tmp_path):
    path = copied(made, kind, tmp_path)
    pick = torch.Generator().manual_seed(0)
    for file in sorted(path.iterdir()):
        size = file.stat().st_size
        if file.name in ("README.md", "checksums.json") or not size:
            continue
        places = torch.randint(size, (3,), generator=pick).tolist()
        expected = dict.fromkeys([0, size - 1, *places], file.name)
        if file.suffix == ".safetensors":
            start, tensors = layout(file)
            # Its length, its metadata, a name, the last bit of its padding; and of every tensor the ends.
            expected = dict.fromkeys([0, 7, 12, start // 2, start - 1], f"{file.name}: its header")
            for name, (place, length) in tensors.items():
                if length:
                    expected |= dict.fromkeys([place, place + length - 1], f"{file.name}: tensor '{name}'")
        for place, name in expected.items():
            flip(file, place, bit=place % 8)
            with pytest.raises(ValueError) as error:
                verify(path)
            assert str(error.value).startswith(f"{path} is not as it was saved: {name}"), (file.name, place)
            assert ";" not in str(error.value)  # nothing else is accused
            flip(file, place, bit=place % 8)
    verify(path)


def test_several_damages_are_all_named_and_what_people_may_change_is_not_damage(made, tmp_path):
    path = copied(made, "materialized", tmp_path)
    (path / "README.md").write_text("mine")
    (path / "notes.txt").write_text("mine")
    verify(path)
    _, tensors = layout(path / "model.safetensors")
    names = list(tensors)[:2]
    for name in names:
        flip(path / "model.safetensors", tensors[name][0])
    (path / "generation_config.json").unlink()
    with open(path / "model.safetensors", "ab") as file:
        file.write(b"\0\0\0")
    files.write_tensors(path / "model-00002.safetensors", {"x": torch.ones(2)})
    with pytest.raises(ValueError) as error:
        verify(path)
    for what in (
        "generation_config.json is missing",
        "model-00002.safetensors was not saved with the others",
        *(f"tensor {name!r}" for name in names),
        "3 bytes after the last tensor",
    ):
        assert what in str(error.value)
    (path / "model.safetensors").write_bytes((made / "materialized" / "model.safetensors").read_bytes()[:-8])
    with pytest.raises(ValueError, match="model.safetensors: tensor "):
        verify(path)
    (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model.safetensors: its header"):
        verify(path)


def test_a_directory_without_checksums_loads_as_ever(made, tmp_path):
    path = copied(made, "elastic", tmp_path)
    (path / "checksums.json").unlink()
    acip_kernels.load(path, 0.5)
    with pytest.raises(ValueError, match="has no checksums.json: it was saved by another program, or by a version"):
        verify(path)
    with pytest.raises(ValueError, match="is not a directory"):
        verify(path / "config.json")


HOSTILE = {
    "list": [],
    "no files": {"algorithm": "sha256"},
    "algorithm": {"algorithm": "md5", "files": {}},
    "elsewhere": {"algorithm": "sha256", "files": {"../model/config.json": "0"}},
    "above": {"algorithm": "sha256", "files": {"..": "0"}},
    "number": {"algorithm": "sha256", "files": {"config.json": 3}},
    "tensors": {"algorithm": "sha256", "files": {"model.safetensors": {"header": "0", "tensors": []}}},
    "no tensors": {"algorithm": "sha256", "files": {"model.safetensors": {"header": "0"}}},
}


@pytest.mark.parametrize("fields", HOSTILE.values(), ids=HOSTILE)
def test_checksums_that_are_none(made, fields, tmp_path):
    path = copied(made, "materialized", tmp_path)
    (path / "checksums.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="checksums.json|is missing"):
        verify(path)


HEADERS = [b"[]", b'{"a": 3}', b'{"a": {}}', b'{"a": {"data_offsets": [0, 99999]}}', b"{" * 9, b"[" * 9999, b"\xff"]
ENDS = (b"8, 0", b"-8, 0", b"0", b'"0", "8"', b"null, 8", b"0, 0.5", b"0, true")
HEADERS += [b'{"a": {"data_offsets": [%s]}}' % ends for ends in ENDS]


@pytest.mark.parametrize("length", [None, 0, 2**63])
def test_headers_that_were_made_to_harm_are_named_even_with_their_digest(length, tmp_path):
    """Whoever writes the file can write its checksums."""
    file = tmp_path / "model.safetensors"
    for header in HEADERS:
        file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + b"\0" * 8)
        with checksums._opened(file) as (handle, _):
            digest = checksums._digest(handle, (0, checksums._header_end(handle)))
        fields = {"algorithm": "sha256", "files": {file.name: {"header": digest, "tensors": {}}}}
        files.write_json(tmp_path / "checksums.json", fields)
        with pytest.raises(ValueError, match="model.safetensors: its header, which is that of no safetensors file"):
            verify(tmp_path)


def test_large_tensors_are_read_in_blocks(made, monkeypatch):
    monkeypatch.setattr(checksums, "_BLOCK", 100)
    verify(made / "elastic")


def test_the_command(made, tmp_path, monkeypatch, capsys):
    path = copied(made, "elastic", tmp_path)

    def command():
        monkeypatch.setattr(sys, "argv", ["acip", "verify", str(path), "--json"])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr()

    status, shown = command()
    assert status == 0 and json.loads(shown.out) == {"path": str(path), "as_saved": True, **verify(path)}
    _, tensors = layout(path / "elastic.safetensors")
    name = "model.layers.1.mlp.up_proj.U"
    flip(path / "elastic.safetensors", tensors[name][0] + 5)
    status, shown = command()
    assert status == 1 and f"elastic.safetensors: tensor '{name}'" in shown.err and not shown.out
