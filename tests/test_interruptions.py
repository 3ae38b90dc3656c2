"""Kills, full disks and second processes, in every phase: nothing is lost, and what goes on ends in the same bits."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import toys
import transformers.modeling_utils
from test_run import CHECKPOINT, HISTORY, Spoiled, Stop, flat, make_batches, short, stop_at
from test_run import run as run_acip
from transformers import AutoModelForCausalLM

from acip_kernels import CompressionResult, NestedConfig, compress, files, load, materialize, save
from acip_kernels.models import saving

factorizing = sys.modules["acip_kernels.compress.factorize"]  # the package has the function under this name

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the tests kill forks of themselves")


def in_a_fork(function, seconds=60):
    """The exit status of `function()` in a process of its own: minus the signal's number for a killed one."""

    def child():
        signal.alarm(seconds)
        function()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def kill_at(owner, name, call, *, half=None):
    """Make the process kill itself at a call of `owner.name`; with `half(*args)`, after that has been done of it."""
    original, calls = getattr(owner, name), 0

    def counting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call:
            if half is not None:
                half(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counting)


def half_a_file(tensors, name, *rest):
    """What a kill in the middle of writing leaves."""
    whole = safetensors.torch.save(tensors)
    with open(name, "wb") as file:
        file.write(whole[: len(whole) // 2])


def of_run(method, output=None, resume=False, **options):
    if method == "acip":
        config = short(adapter_dropout=0.2, checkpoint_seconds=0.0)
    else:
        config = NestedConfig(steps=6, update_rank=2, calibration_batches=2, dtype="float32", checkpoint_seconds=0.0)
    return compress(
        toys.llama(), make_batches(), config, output=output, resume=resume, progress=False,
        svd_cache=None if output is None else output / "svd", **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    """The parameters and scores of each method's run without an interruption."""
    runs = {method: of_run(method) for method in ("acip", "nested")}
    return {method: (run.model.state_dict(), run.history) for method, run in runs.items()}


# The decompositions of 14 layers are written first, then a nested run's ranking, then a checkpoint every step.
KILLS = {
    "decomposition": lambda: kill_at(torch.linalg, "svd", 6),
    "what is kept of a decomposition": lambda: kill_at(safetensors.torch, "save_file", 3, half=half_a_file),
    "first checkpoint, or ranking": lambda: kill_at(safetensors.torch, "save_file", 15, half=half_a_file),
    "checkpoint": lambda: kill_at(safetensors.torch, "save_file", 18, half=half_a_file),
    "before its name": lambda: kill_at(os, "replace", 18),
    "after its name": lambda: kill_at(os, "replace", 18, half=os.rename),
}


@pytest.mark.parametrize("phase", KILLS)
@pytest.mark.parametrize("method", ["acip", "nested"])
def test_a_run_killed_in_any_phase_goes_on_to_the_same_bits(whole, method, phase, tmp_path):
    output = tmp_path / "ein Lauf, 50 % größe×λ 模型"

    def killed():
        KILLS[phase]()
        of_run(method, output)

    assert in_a_fork(killed) == -signal.SIGKILL
    assert not (output / "elastic").exists()
    made = []
    resumed = of_run(method, output, resume=True, on_step=lambda row: made.append(row["step"]))
    state, history = whole[method]
    assert all(torch.equal(tensor, state[name]) for name, tensor in resumed.model.state_dict().items())
    without_time = [{key: value for key, value in row.items() if key != "seconds"} for row in history]
    assert [{key: value for key, value in row.items() if key != "seconds"} for row in resumed.history] == without_time
    if "name" in phase or phase == "checkpoint":
        assert made and made[0] > 0  # not from the beginning
    unfinished = [file.name for file in output.rglob(".*.*") if file.parent.name != "svd"]
    assert unfinished == []


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    base = tmp_path_factory.mktemp("base") / "llama"
    toys.llama().save_pretrained(base)
    return toys.toy_result(AutoModelForCausalLM.from_pretrained(base))


@pytest.fixture(params=["elastic", "materialized"])
def to_save(request, result):
    return result if request.param == "elastic" else materialize(result, 0.5)


def content(path):
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def logits_of(path):
    elastic = any(path.glob("elastic*"))
    return toys.logits(load(path, 0.5) if elastic else load(path))


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("where", ["weights", "the last file", "before the name", "after the name"])
def test_a_save_that_is_killed_leaves_the_old_or_the_new(to_save, where, there, tmp_path):
    path = tmp_path / "model"
    if there:
        toys.llama(seed=5).save_pretrained(path)
    before = content(tmp_path)

    def killed():
        if where == "weights":
            kill_at(safetensors.torch, "save_file", 1, half=half_a_file)  # which huggingface_hub imports as it writes
            kill_at(transformers.modeling_utils, "safe_save_file", 1, half=half_a_file)
        elif where == "the last file":
            kill_at(saving, "model_card", 1)
        else:
            after = where == "after the name"
            exchange = files._exchange
            kill_at(files, "_exchange", 1, half=exchange if after else None)
            if not there:  # the files' own names come first
                replace = os.replace
                os.replace = lambda source, target: (
                    (after and replace(source, target), os.kill(os.getpid(), signal.SIGKILL))
                    if os.path.isdir(source)
                    else replace(source, target)
                )
        save(to_save, path, overwrite=there)

    assert in_a_fork(killed) == -signal.SIGKILL
    if where == "after the name":
        whole = materialize(to_save, 0.5) if isinstance(to_save, CompressionResult) else to_save
        toys.assert_close(logits_of(path), toys.logits(whole))
    else:
        assert content(path) == {name.removeprefix("model/"): data for name, data in before.items()}
    # What is left lies beside it, hidden, and is in nobody's way.
    assert all(name == "model" or name.startswith(".model.") for name in os.listdir(tmp_path))
    save(to_save, path, overwrite=True)
    assert torch.isfinite(logits_of(path)).all()


# ---- full disks


def limit_files(size):
    """From now on no file of this process grows beyond `size` bytes: writing fails in the middle, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [0, 5_000, 20_000])
def test_a_save_to_a_full_disk_leaves_what_was_there(to_save, size, tmp_path):
    path = tmp_path / "model"
    save(to_save, path)
    before = content(tmp_path)

    def full():
        limit_files(size)
        with pytest.raises(OSError, match="File too large"):
            save(to_save, path, overwrite=True)

    assert in_a_fork(full) == 0
    assert content(tmp_path) == before and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("size", [100, 30_000])
def test_a_run_on_a_full_disk_goes_on_where_it_was(whole, size, tmp_path):
    output = tmp_path / "run"
    with pytest.raises(Stop):
        of_run("acip", output, on_step=stop_at(4))
    before = (output / CHECKPOINT).read_bytes()
    assert len(before) > 30_000 and len((output / HISTORY).read_bytes()) > 100

    def full():
        limit_files(size)
        with pytest.raises(OSError, match="File too large"):
            of_run("acip", output, resume=True)

    assert in_a_fork(full) == 0
    assert (output / CHECKPOINT).read_bytes() == before
    resumed = of_run("acip", output, resume=True)
    assert all(torch.equal(tensor, whole["acip"][0][name]) for name, tensor in resumed.model.state_dict().items())


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 200 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "none", path], capture_output=True).returncode:
        pytest.skip("needs leave to mount")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_disk_that_is_full(to_save, small_disk):
    (small_disk / "model").mkdir()
    (small_disk / "model" / "mine").write_text("old")
    (small_disk / "filling").write_bytes(b"\0" * 150_000)
    with pytest.raises(OSError, match="No space left on device"):
        save(to_save, small_disk / "model", overwrite=True)
    assert content(small_disk / "model") == {"mine": b"old"}
    assert sorted(os.listdir(small_disk)) == ["filling", "model"]


# ---- two processes


def test_two_runs_do_not_share_a_directory(tmp_path):
    def second():
        for resume in (False, True):
            with pytest.raises(RuntimeError, match="run is in use by another run: wait for its end"):
                run_acip(output=tmp_path / "run", resume=resume)

    first = []

    def on_step(row):
        if row["step"] == 3:
            first.append(in_a_fork(second))

    result = run_acip(output=tmp_path / "run", on_step=on_step)
    assert first == [0]
    assert torch.equal(flat(result), flat(run_acip()))
    run_acip(output=tmp_path / "run", resume=True)  # the lock ended with the run


def test_of_two_writers_one_wins_whole(result, tmp_path):
    path = tmp_path / "model"

    def write(text, overwrite):
        with files.new_directory(path, overwrite=overwrite) as fresh:
            (fresh / "file").write_text(text)

    with pytest.raises(FileExistsError, match="model was written by another process in the meantime"):
        with files.new_directory(path) as fresh:
            (fresh / "file").write_text("slow")
            write("quick", False)
    assert content(tmp_path) == {"model/file": b"quick"} and os.listdir(tmp_path) == ["model"]
    with files.new_directory(path, overwrite=True) as fresh:
        (fresh / "file").write_text("slow")
        write("quicker", True)
        assert content(path) == {"file": b"quicker"}
    assert content(tmp_path) == {"model/file": b"slow"} and os.listdir(tmp_path) == ["model"]


def test_many_writers_and_readers_at_once_see_whole_directories(tmp_path):
    """Three processes replace a directory, one reads it: it is there at every moment, and of one writer."""
    path = tmp_path / "model"
    number = 40

    def write(text):
        for _ in range(number):
            with files.new_directory(path, overwrite=True) as fresh:
                for name in ("a", "b"):
                    (fresh / name).write_text(text)

    write("0")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(text,)) for text in "123"]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        directory = os.open(path, os.O_RDONLY)  # of one moment, whatever is put in its place
        try:
            found = []
            for name in ("a", "b"):
                file = os.open(name, os.O_RDONLY, dir_fd=directory)
                found.append(os.read(file, 9))
                os.close(file)
            assert found[0] == found[1]
        except FileNotFoundError:  # replaced and deleted while it was read
            assert path.exists()
        finally:
            os.close(directory)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("kind", ["elastic", "compact", "materialized"])
def test_two_processes_load_one_directory_at_once(result, kind, tmp_path):
    path, cache = tmp_path / "model", tmp_path / "svd"
    if kind == "materialized":
        save(materialize(result, 0.5), path)
    else:
        result.save(path, compact=kind == "compact")
    options = {} if kind == "materialized" else {"size_ratio": 0.5, "svd_cache": cache}
    expected = toys.logits(materialize(result, 0.5))
    context = multiprocessing.get_context("fork")
    together = context.Barrier(2)

    def read():
        together.wait(30)
        toys.assert_close(toys.logits(load(path, **options)), expected)

    readers = [context.Process(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert not list(tmp_path.rglob(".*"))


# ---- where nothing can be written


def test_an_output_that_cannot_be_written_is_known_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(factorizing, "svd", lambda weight: pytest.fail("decomposed for nothing"))
    with pytest.raises(OSError, match="file"):
        run_acip(output=tmp_path / "file" / "run")


def test_a_cache_that_cannot_be_written_only_costs_time(result, tmp_path, caplog):
    result.save(tmp_path / "compact", compact=True)
    (tmp_path / "file").write_text("")
    model = load(tmp_path / "compact", 0.5, svd_cache=tmp_path / "file" / "svd")
    toys.assert_close(toys.logits(model), toys.logits(materialize(result, 0.5)))
    assert "the decomposition is not kept" in caplog.text


# ---- what a run keeps, damaged


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.update(U=tensors["U"][:, :3].contiguous()),
        lambda tensors: tensors.update(S=tensors["S"] * float("nan")),
        lambda tensors: tensors.update(Vh=tensors["Vh"].int()),
        lambda tensors: tensors.pop("Vh"),
    ],
)
def test_a_damaged_decomposition_is_made_anew(damage, tmp_path, caplog):
    first = run_acip(config=short(2, 0.9), output=tmp_path / "a", svd_cache=tmp_path / "svd")
    for file in (tmp_path / "svd").iterdir():
        tensors = files.read_tensors(file)
        damage(tensors)
        files.write_tensors(file, tensors)
    again = run_acip(config=short(2, 0.9), output=tmp_path / "b", svd_cache=tmp_path / "svd")
    assert torch.equal(flat(again), flat(first)) and "decomposing anew" in caplog.text


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.update({name: tensors[name][:3].contiguous() for name in tensors if "scores" in name}),
        lambda tensors: tensors.update({"nothing.U": torch.ones(3, 3)}),
        lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(".Vh"))),
    ],
)
def test_a_damaged_ranking_is_made_anew(whole, damage, tmp_path, caplog):
    with pytest.raises(Stop):
        of_run("nested", tmp_path, on_step=stop_at(2))
    tensors = files.read_tensors(tmp_path / "ranking.safetensors")
    damage(tensors)
    files.write_tensors(tmp_path / "ranking.safetensors", tensors)
    resumed = of_run("nested", tmp_path, resume=True)
    assert all(torch.equal(tensor, whole["nested"][0][name]) for name, tensor in resumed.model.state_dict().items())
    assert "ranking anew" in caplog.text


def test_a_run_that_stopped_before_its_first_step_goes_on(tmp_path):
    with pytest.raises(FloatingPointError, match="step 0"):
        run_acip(Spoiled(0, "loss"), output=tmp_path)
    assert (tmp_path / CHECKPOINT).exists() and not (tmp_path / HISTORY).exists()
    resumed = run_acip(Spoiled(1000, "loss"), output=tmp_path, resume=True)
    assert torch.equal(flat(resumed), flat(run_acip(Spoiled(1000, "loss"))))


def test_a_damaged_checkpoint_is_named_and_stays(tmp_path):
    with pytest.raises(Stop):
        of_run("acip", tmp_path, on_step=stop_at(4))
    path, history = tmp_path / CHECKPOINT, (tmp_path / HISTORY).read_bytes()
    good = path.read_bytes()
    tensors = files.read_tensors(path)
    with files.open_tensors(path) as file:
        about = json.loads(file.metadata()["acip"])
    fields = [{"step": -1}, {"step": 4.0}, {"step": 4}, {"step": 50}, {"phase": "prunf"}, {"phase": ["prune"]},
              {"consumed": None}, {"layers": 3}, {"config": []}, {"config": {}}, {"format_version": 99}]  # fmt: skip
    cases = [(json.dumps(about | change), tensors) for change in fields[:2] + fields[3:]]
    cases += [("[", tensors), ("[1]", tensors), ("[" * 100_000, tensors), (json.dumps({"step": 3}), tensors)]
    for change in (
        {"parameter.masks": torch.zeros(3)},
        {"random.cpu": torch.zeros(3)},
        {"scores": torch.zeros(3)},
        {"computed": torch.zeros(3, dtype=torch.bool)},
    ):
        cases.append((json.dumps(about), tensors | change))
    cases += [(json.dumps(about), {key: value for key, value in tensors.items() if key != left_out})
              for left_out in ("parameter.masks", "random.cpu", "scores")]  # fmt: skip
    for text, stored in cases:
        files.write_tensors(path, stored, {"acip": text})
        bad = path.read_bytes()
        with pytest.raises(ValueError, match=f"{CHECKPOINT}"):
            of_run("acip", tmp_path, resume=True)
        assert path.read_bytes() == bad and (tmp_path / HISTORY).read_bytes() == history
    path.write_bytes(good)
    for lines in (b"", history[: len(history) // 2], b"{}\n" + history):
        (tmp_path / HISTORY).write_bytes(lines)
        with pytest.raises(ValueError, match="history.jsonl does not hold the 5 steps"):
            of_run("acip", tmp_path, resume=True)
    (tmp_path / HISTORY).unlink()
    with pytest.raises(ValueError, match="history.jsonl cannot be read"):
        of_run("acip", tmp_path, resume=True)
    (tmp_path / HISTORY).write_bytes(history)
    assert isinstance(of_run("acip", tmp_path, resume=True), CompressionResult)
