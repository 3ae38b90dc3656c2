"""Files made to harm: no code of theirs runs, no memory beyond their size is taken, and whatever is in them is an error
that `ValueError` names, or a model."""

import ast
import builtins
import copy
import json
import pathlib
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
import toys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import AutoModelForCausalLM, GPTNeoConfig

import acip_kernels
from acip_kernels import CompressionConfig, NestedConfig, RankingConfig, cli, files, load, materialize
from acip_kernels.models import saving
from acip_kernels.models.quantizer import AcipConfig
from acip_kernels.report import read_history

ROOT = pathlib.Path(acip_kernels.__file__).parent


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of each kind; nothing may write into these."""
    root = tmp_path_factory.mktemp("models")
    toys.llama().save_pretrained(root / "base")
    result = toys.toy_result(AutoModelForCausalLM.from_pretrained(root / "base"))
    result.save(root / "elastic")
    result.save(root / "compact", compact=True)
    acip_kernels.save(materialize(result, 0.5), root / "materialized")
    acip_kernels.save(materialize(result, 0.5, quantize="int4"), root / "quantized")
    return root


KINDS = ("elastic", "compact", "materialized", "quantized")


def copied(made, kind, tmp_path):
    path = tmp_path / "model"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(made / kind, path)
    return path


def change_config(path, **changes):
    fields = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | changes))


# ---- code


def test_nothing_here_unpickles_evaluates_or_trusts():
    unsafe = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy", "imp"}
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                # `acip run` runs the program that its user names.
                allowed = {"runpy"} if file.name == "launch.py" else set()
                assert not unsafe & {name.split(".")[0] for name in names} - allowed, where
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "__import__"), where
            assert called not in ("torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "np.load"), where
            if called.startswith("Auto") and called.endswith(".from_pretrained"):
                trust = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert trust.get("trust_remote_code") == "False", where
            assert not any(keyword.arg == "shell" for keyword in node.keywords), where


class Evil:
    """What unpickles as a command that leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return pathlib.Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", KINDS)
def test_no_code_of_a_checkpoint_runs_even_for_who_says_yes(made, kind, tmp_path, monkeypatch):
    path, mark = copied(made, kind, tmp_path), tmp_path / "mark"
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Config: pass\nclass Model: pass\n"
    (path / "evil.py").write_text(code)
    # transformers would ask, and take an answer that came through a pipe.
    monkeypatch.setattr(builtins, "input", lambda *text: "y")
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    change_config(path, auto_map=auto_map)
    (path / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto_map, "tokenizer_class": "T"}))
    size_ratio = 0.5 if kind in ("elastic", "compact") else None
    toys.logits(load(path, size_ratio))  # of a model type that transformers knows, its own class
    for use in (lambda: load(path, size_ratio), lambda: cli._load(str(path), "cpu", "float32", size_ratio)):
        change_config(path, model_type="evil")
        with pytest.raises(ValueError):
            use()
    change_config(path, model_type="llama")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        cli._tokenizer(str(path))
    for name in ("model.safetensors", "elastic.safetensors", "pytorch_model.bin", "history.jsonl"):
        (path / name).write_bytes(pickle.dumps({"weight": Evil(mark)}))
    with pytest.raises(ValueError, match="safetensors"):
        load(path, size_ratio)
    for name in ("model.safetensors", "elastic.safetensors"):
        (path / name).unlink()
    with pytest.raises(ValueError, match="safetensors is missing"):
        load(path, size_ratio)
    assert not mark.exists() and not list(path.rglob("*.pyc"))
    pickle.loads((path / "pytorch_model.bin").read_bytes())
    assert mark.exists()  # it would have shown


# ---- memory

HUGE = """
import json, pathlib, resource, sys
import torch
torch.set_num_threads(1)
import acip_kernels
from acip_kernels.models import quantizer

acip_kernels.load(sys.argv[1])  # what loading needs at all
def taken():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
limit = taken() + 100_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    torch.empty(120_000_000, dtype=torch.uint8)
except RuntimeError:
    pass
else:
    raise SystemExit("the limit does not hold")
for path in sys.argv[2:]:
    kind = json.loads((pathlib.Path(path) / "config.json").read_text())["quantization_config"]["kind"]
    for size_ratio in (None, 0.5) if kind == "elastic" else (None,):
        try:
            acip_kernels.load(path, size_ratio)
        except ValueError as error:
            print(pathlib.Path(path).name, "ValueError", flush=True)
        else:
            raise SystemExit(f"{path} was loaded")
"""


def test_no_number_in_a_file_takes_memory_that_the_file_has_not(made, tmp_path):
    """Under a limit of 100 MB, files of some kB that describe terabytes, or lists of 10**9."""
    up = "model.layers.0.mlp.up_proj"
    tops = [{name: 2**40} for name in ("vocab_size", "hidden_size", "intermediate_size", "head_dim")]
    tops += [{name: 10**9} for name in ("num_hidden_layers", "num_attention_heads", "num_labels")]
    tops += [{"num_hidden_layers": 90_000}, {"num_hidden_layers": 1e300}, {"num_key_value_heads": 2**40}]
    tops += [{"model_type": "qwen2", "num_hidden_layers": 10**9}, {"model_type": "gpt2", "n_layer": 10**9}]
    cases = [(kind, top, {}) for kind in ("elastic", "materialized") for top in tops]
    cases += [("materialized", {}, {"ranks": {up: rank}}) for rank in (2**40, 10**300)]
    cases += [("elastic", {}, {"layers": {up: {"adapter_rank": rank}}}) for rank in (2**40, 10**300)]
    paths = []
    for number, (kind, top, ours) in enumerate(cases):
        path = tmp_path / f"{number}-{kind}"
        shutil.copytree(made / kind, path)
        fields = json.loads((path / "config.json").read_text()) | top
        for field, change in ours.items():
            fields["quantization_config"][field] |= change
        (path / "config.json").write_text(json.dumps(fields))
        paths.append(path)
    # Offsets and shapes that a file does not have.
    for number, (shape, end) in enumerate([([2**40], 2**42), ([2**40], 8), ([2**62, 2**62], 8), ([1], 2**62)]):
        path = tmp_path / f"weights-{number}"
        shutil.copytree(made / "materialized", path)
        header = json.dumps({"lm_head.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()
        (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
        paths.append(path)
    command = [sys.executable, "-c", HUGE, str(made / "materialized"), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout
    assert {line.split()[0] for line in done.stdout.splitlines()} == {path.name for path in paths}


def test_tables_that_a_model_makes_of_itself_are_counted_too(tmp_path):
    """GPT-Neo's mask of all positions is no tensor of a file: 4 TB for an embedding of two million positions."""
    config = GPTNeoConfig(hidden_size=8, num_heads=2, num_layers=2, attention_types=[[["global"], 2]], vocab_size=8)
    config.max_position_embeddings = 2**21
    with pytest.raises(ValueError, match=r"config.json describes a model with tables of \d{13} bytes"):
        saving._empty_model(tmp_path, config, {})


# ---- anything at all

QUICK = settings(
    derandomize=True, database=None, deadline=None, max_examples=150, suppress_health_check=list(HealthCheck)
)
SLOW = settings(QUICK, max_examples=40)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -0.0, 5e-324, float("nan"), float("inf")]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "..", "/", "__class__", "to_dict", "bfloat16", "elastic", "model.layers.0.mlp.up_proj"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value, path=()):
    """The way to every value in nested objects and lists."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


@st.composite
def mutated(draw, fields):
    """`fields` with some values replaced, left out or added."""
    fields = copy.deepcopy(fields)
    for _ in range(draw(st.integers(1, 3))):
        *way, last = draw(st.sampled_from(sorted(places(fields), key=repr)))
        holder = fields
        for key in way:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "leave out", "add"]))
        if action == "leave out":
            del holder[last]
        elif action == "add" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8) | st.sampled_from(["self", "cls", "scheme", "__dict__"]))] = draw(VALUES)
        else:
            holder[last] = draw(VALUES)
        if not fields:
            break
    return fields


def outcome(use):
    """What `use()` gives, or None for a `ValueError` that says something."""
    try:
        return use()
    except ValueError as error:
        assert str(error)
        return None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["ours", "all"])
def test_any_config_is_a_model_or_an_error(made, kind, part, tmp_path):
    path = copied(made, kind, tmp_path)
    good = json.loads((path / "config.json").read_text())
    ours = good["quantization_config"]
    if part == "ours":
        # Few layers, so that what is changed is not always one of many.
        few = {key: value for key, value in ours.items() if key not in ("layers", "ranks", "pivoted")}
        strategy = mutated(few | {key: dict(list(ours[key].items())[:2]) for key in ("layers", "ranks") if key in ours})
    else:
        strategy = mutated({key: value for key, value in good.items() if key != "quantization_config"})
    loaded = []

    @SLOW
    @given(strategy)
    def check(fields):
        if part == "ours":
            full = dict(ours)
            for key, value in fields.items():
                both = key in ("layers", "ranks") and isinstance(value, dict) and key in ours
                full[key] = ours[key] | value if both else value
            fields = good | {"quantization_config": {key: value for key, value in full.items()
                                                     if key in fields or key == "pivoted"}}  # fmt: skip
        else:
            fields = fields | {"quantization_config": ours}
        try:
            text = json.dumps(fields)
        except ValueError:  # an int of more digits than Python writes
            return
        (path / "config.json").write_text(text)
        model = outcome(lambda: load(path, 0.5 if kind == "elastic" else None))
        loaded.append(model is not None)
        if model is not None and part == "ours":
            toys.logits(model)

    check()
    assert not all(loaded)


@pytest.mark.parametrize("kind", KINDS)
def test_how_a_model_generates_comes_along_or_is_named(made, kind, tmp_path):
    path, size_ratio = copied(made, kind, tmp_path), 0.5 if kind in ("elastic", "compact") else None
    fields = {"eos_token_id": [2, 5], "temperature": 0.9, "top_p": 0.6}  # not valid without do_sample, and published
    (path / "generation_config.json").write_text(json.dumps(fields))
    for ratio in {size_ratio, None}:
        config = load(path, ratio).generation_config
        assert config.eos_token_id == [2, 5] and config.top_p == 0.6
    for bad in ({"watermarking_config": 3}, {"self": 1}, {"__class__": 3}, {"compile_config": "x"}, {"to_dict": 4}, []):
        (path / "generation_config.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="generation_config.json"):
            load(path, size_ratio)


@QUICK
@given(st.dictionaries(st.text(max_size=5) | st.sampled_from(list(AcipConfig().to_dict())), VALUES, max_size=4))
def test_any_quantization_config_is_refused_or_comes_back(fields):
    made = outcome(lambda: AcipConfig(**fields))
    if made is not None:
        again = AcipConfig(**made.to_dict())
        assert repr(again.to_dict()) == repr(made.to_dict())  # NaN is not equal to itself


@pytest.mark.parametrize(
    "config", [CompressionConfig(), NestedConfig(), RankingConfig()], ids=lambda c: type(c).__name__
)
def test_any_origin_is_refused_or_comes_back(config):
    @QUICK
    @given(mutated(json.loads(json.dumps(config.to_dict()))))
    def check(fields):
        made = outcome(lambda: saving.config_from_dict(fields))
        assert made is None or made.to_dict()["config"] in ("CompressionConfig", "NestedConfig", "RankingConfig")

    check()


@pytest.mark.parametrize("kind", KINDS)
def test_any_damage_to_weights_is_a_model_or_an_error(made, kind, tmp_path):
    path = copied(made, kind, tmp_path)
    file = next(path.glob("*.safetensors"))
    good = file.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    position = st.integers(0, header - 1) | st.integers(0, len(good) - 1)
    edit = st.tuples(position, st.sampled_from(["flip", "cut", "insert", "zero", "reverse"]), st.integers(1, 64))

    @SLOW
    @given(st.lists(edit, min_size=1, max_size=3))
    def check(edits):
        data = bytearray(good)
        for place, action, amount in edits:
            inside = slice(place, place + amount)
            if action == "flip" and place < len(data):
                data[place] ^= 1 << amount % 8
            elif action == "cut":
                del data[inside]
            elif action == "insert":
                data[place:place] = bytes(range(amount))
            elif action == "zero":
                data[inside] = bytes(len(data[inside]))
            else:  # as of another byte order
                data[inside] = data[inside][::-1]
        file.write_bytes(data)
        model = outcome(lambda: load(path, 0.5 if kind == "elastic" else None))
        if model is not None:
            assert toys.logits(model).shape == (2, 12, toys.VOCABULARY)

    check()


@pytest.mark.parametrize("length", [8, 16])
def test_a_file_of_the_other_byte_order_is_refused(length, tmp_path):
    data = save({"t": torch.arange(4.0)})
    (tmp_path / "t.safetensors").write_bytes(data[:8][::-1] + (data[8:] if length == 8 else data[8:][::-1]))
    with pytest.raises(ValueError, match="t.safetensors is not a whole safetensors file"):
        files.read_tensors(tmp_path / "t.safetensors")


@pytest.mark.parametrize("read", [files.read_json, files.read_tensors, read_history])
def test_any_bytes_are_read_or_refused(read, tmp_path):
    path = tmp_path / "file"
    bits = [b"{", b"}", b"[", b']"', b'"a":', b'{"a":', b"\n", b"1", b"\xff", b"\0" * 8, b"\x10" + b"\0" * 7, b"NaN"]
    pieces = [*bits, save({"t": torch.ones(2)}), b"[" * 2000]

    @QUICK
    @given(st.lists(st.sampled_from(pieces) | st.binary(max_size=12), max_size=6))
    def check(data):
        path.write_bytes(b"".join(data))
        outcome(lambda: read(path))

    check()
