"""Many processes: two of them, by gloo, against one; what they write, how they stop and go on, what they refuse."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback

import pytest
import torch
import torch.distributed as dist
import toys
from filelock import FileLock  # comes with huggingface-hub
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from acip_kernels import CompressionConfig, NestedConfig, RankingConfig, cli, compress, files, load, materialize, save
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.loop import CHECKPOINT, HISTORY
from acip_kernels.compress.nested import RANKING
from acip_kernels.compress.processes import Processes, joined
from acip_kernels.nn import LowRankLinear, PivotLinear, SVDLinear
from acip_kernels.nn.nested_linear import NestedLinear
from acip_kernels.nn.sharded import Sharded
from acip_kernels.plan import run_memory

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "many-devices.md").read_text("utf-8")

COUNT = 5  # an odd number: at the end of what they calibrate with, one process has no batch

ACIP = CompressionConfig.short(8, 0.5, adapter_rank=2, tune_steps=3, dtype="float64")
NESTED = NestedConfig(steps=5, warmup_steps=2, calibration_batches=COUNT, dtype="float64")
RANKINGS = {
    f"{method}-{allocation}": RankingConfig(method=method, allocation=allocation, calibration_batches=COUNT)
    for method, allocation in (
        ("importance", "worth"),
        ("importance", "measured"),
        ("svd_llm", "loss"),
        ("asvd", "sensitivity"),
        ("svd", "global"),
    )
}


RESUMED = ("acip", "nested", "acip-sharded", "nested-sharded")


def changed(config, **changes):
    return type(config).from_dict(config.to_dict() | changes)


RUNS = {
    "acip": ACIP,
    "acip-activations": changed(ACIP, basis="activations"),
    "acip-no-dropout": changed(ACIP, adapter_dropout=0.0),
    "acip-accumulated": changed(ACIP, gradient_accumulation=2),
    "nested": NESTED,
}
SHARDED = {
    "acip-sharded": changed(ACIP, shard=True),
    "acip-sharded-recomputed": changed(ACIP, shard=True, gradient_checkpointing=True),
    "nested-sharded": changed(NESTED, shard=True),
    "nested-sharded-recomputed": changed(NESTED, shard=True, gradient_checkpointing=True),
}
SINGLE = {"acip-float32": changed(ACIP, dtype="float32"), "nested-float32": changed(NESTED, dtype="float32")}


def batches():
    return [{"input_ids": toys.token_ids(seed=seed)} for seed in range(COUNT)]


def run(config, data=None, model=None, **options):
    return compress(model or toys.llama(), data or batches(), config, progress=False, **options)


def kept(result):
    """What a run has made, by name."""
    return {
        f"{name}.{key}": getattr(layer, key).detach().contiguous()
        for name, layer in svd_layers(result.model).items()
        for key in ("scores", "mask", "S", "U", "Vh", "lora_A", "lora_B")
        if hasattr(layer, key)
    }


def frozen_bytes(model):
    """What this process holds of factors, and of the weights that teach."""
    tensors = []
    for module in model.modules():
        if isinstance(module, NestedLinear):
            tensors += [module.left_t, module.right, module.dense, *(module._updated or ())]
        elif isinstance(module, SVDLinear):
            tensors += [module.U, module.Vh, module._weight, *(module._factors or ())[:2]]
        elif isinstance(module, Sharded):
            tensors += [parameter.to_local() for parameter in module.parameters()]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


# ---- what each of the two processes does


def work(rank, directory, out):
    """Every run, into `out`, this process's directory."""

    def keep(name, result):
        files.write_tensors(out / f"{name}.safetensors", kept(result))
        files.write_json(out / f"{name}.json", {"history": without_time(result.history), "ratio": result.size_ratio})

    for name, config in (RUNS | SINGLE | RANKINGS).items():
        keep(name, run(config, svd_cache=out / "svd" if name == "svd-global" else None))
    for name, config in SHARDED.items():
        held, model = [], toys.llama()
        keep(
            name, run(config, model=model, on_step=lambda row, held=held, model=model: held.append(frozen_bytes(model)))
        )
        files.write_json(out / f"{name}-held.json", {"bytes": held})
    for name in RESUMED:
        # To each its own directory: what the second one's holds at the end, the second has written.
        output = out / f"{name}-run"

        def stop(row):
            if row["step"] == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
            run((RUNS | SHARDED)[name], output=output, on_step=stop)
        keep(f"{name}-resumed", run((RUNS | SHARDED)[name], output=output, resume=True))
    refuse(rank, out)
    divide(directory, out)


def refuse(rank, out):
    with pytest.raises(ValueError, match="config.seed is 0 for rank 0 and 1 for rank 1; start all of them"):
        run(changed(ACIP, seed=rank))
    with pytest.raises(ValueError, match=r"embed_tokens.weight is .* for rank 1; .* differences more\); start all"):
        run(ACIP, model=toys.llama(seed=rank))
    for config in (ACIP, RANKINGS["importance-worth"], RUNS["acip-activations"]):
        with pytest.raises(ValueError, match="batches is .*; give all of them the same batches"):
            run(config, batches()[rank:])
    with pytest.raises(ValueError, match="holds the checkpoint of a run"):
        run(ACIP, output=out / "acip-run")
    with pytest.raises(ValueError, match=r"2 batches a step, and 2 process\(es\) with a gradient_accumulation of 2"):
        run(changed(ACIP, gradient_accumulation=2), output=out / "acip-run", resume=True)

    # As an expert that only one process's tokens reach.
    model = toys.llama()
    if rank == 1:
        model.model.layers[1].mlp.forward = lambda x: x
    with pytest.raises(ValueError, match="take different ways through the model"):
        run(RANKINGS["importance-worth"], model=model)

    model = toys.llama()

    def drift(row):
        if rank == 1:
            svd_layers(model)["model.layers.0.mlp.up_proj"].mask.data[0] += 1e-9

    with pytest.raises(ValueError, match="parameters is .* they have come apart by step 2"):
        run(changed(ACIP, checkpoint_seconds=0), model=model, output=out / "apart", on_step=drift)

    # The first one's disk is full; the second has nothing to do with it, and is told.
    def full(*arguments):
        raise OSError(28, "no space left")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(files, "write_tensors", full)
        run(changed(ACIP, checkpoint_seconds=0), output=out / "full")


def divide(directory, out):
    """Logits of materialized models whose layers are divided as transformers divides dense ones."""
    options = {"distributed_config": DistributedConfig(tp_size=2), "dtype": torch.float32}
    for name in sorted(path.name for path in directory.glob("tensor-parallel-*")):
        model = AutoModelForCausalLM.from_pretrained(directory / name, **options)
        generated = model.generate(
            toys.token_ids(), max_new_tokens=4, do_sample=False, cache_implementation="static", disable_compile=True
        )
        files.write_tensors(out / f"{name}.safetensors", {"logits": toys.logits(model), "generated": generated})
        parameters = [p.to_local() if isinstance(p, DTensor) else p for p in model.model.layers.parameters()]
        files.write_json(out / f"{name}.json", {"numbers": sum(parameter.numel() for parameter in parameters)})
    # As the page has it, of another model and for two.
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert '"llama-60"' in code and "tp_size=4" in code
    names = {}
    exec(code.replace('"llama-60"', repr(str(directory / name))).replace("tp_size=4", "tp_size=2"), names)
    assert torch.equal(toys.logits(names["model"]), toys.logits(model))
    for name in ("quantized", "quantized-embeddings"):
        with pytest.raises(ValueError, match="quantized layers cannot be divided"):
            AutoModelForCausalLM.from_pretrained(directory / name, **options)


def lose_one(rank, directory, out):
    def die(row):
        if row["step"] == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match=r"[Cc]onnection|peer"):
        run(ACIP, output=out / "run", on_step=die)
    os._exit(0)  # nobody is left to leave the group with


def on_the_command_line(rank, directory, out):
    sys.argv = ["acip", *json.loads((directory / "arguments.json").read_text())]
    with contextlib.redirect_stdout(open(out / "stdout", "w")), contextlib.redirect_stderr(open(out / "stderr", "w")):
        cli.console.file = sys.stderr
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert not end.value.code


def start(rank, function, directory, port):
    """A process of two, forked from one that has imported everything."""
    torch.set_num_threads(1)
    out = directory / str(rank)
    out.mkdir()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        if function is on_the_command_line:
            function(rank, directory, out)
            return
        with pytest.raises(ValueError, match="WORLD_SIZE is 2, but there is no process group"):
            run(ACIP)
        dist.init_process_group("gloo")
        function(rank, directory, out)
        dist.destroy_process_group()
    except BaseException:
        files.write_text(out / "failed", traceback.format_exc())
        raise


def both(function, directory, exits=(0, 0)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_processes"])
    two = [context.Process(target=start, args=(rank, function, directory, port)) for rank in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        # The server that they are forked from does not get the path by itself (before Python 3.13).
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        for process in two:
            process.start()
    for process in two:
        process.join(200)
        process.kill()
    failures = [file.read_text() for file in sorted(directory.glob("*/failed"))]
    assert not failures, "\n".join(failures)
    assert tuple(process.exitcode for process in two) == exits


# ---- what came of it


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes have made; once, whichever of pytest's workers comes first."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    directory = base / "two-processes"
    with FileLock(f"{directory}.lock"):
        if not (directory / "whole").exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            (directory / "whole").touch()
    return directory


def make(directory):
    for kind in ("llama", "qwen2"):
        result = toys.toy_result(toys.MODELS[kind]())
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            svd_layers(result.model)[name].scores.fill_(2.0)  # all of it stays: a dense layer among factorized ones
        save(materialize(result, 0.8, forms=("dense", "factors")), directory / f"tensor-parallel-{kind}-factors")
        save(materialize(result, 0.8), directory / f"tensor-parallel-{kind}-pivoted")
    save(materialize(result, 0.8, quantize="int8"), directory / "quantized")
    save(materialize(result, 0.8, quantize_embeddings="int8"), directory / "quantized-embeddings")
    both(work, directory)


def made(directory, name, rank=0):
    about = files.read_json(directory / str(rank) / f"{name}.json")
    return files.read_tensors(directory / str(rank) / f"{name}.safetensors"), about


@pytest.mark.parametrize("name", [*RUNS, *SHARDED, *SINGLE, *RANKINGS, *(f"{one}-resumed" for one in RESUMED)])
def test_all_processes_have_the_same_bits(two, name):
    (first, about), (second, same) = (made(two, name, rank) for rank in range(2))
    assert about == same
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def bound(rate, steps, dtype):
    """How far apart sums in another order may bring what AdamW trains.

    A step moves a number by about the learning rate, whatever its gradient's size. The order of a sum changes it by an
    eps of its terms; so for a step to change by more than √eps of the rate, the terms would have to cancel to less than
    √eps of themselves, which those of the toy do not.
    """
    return rate * steps * torch.finfo(dtype).eps ** 0.5


def assert_near(name, actual, expected, tolerance):
    assert set(actual) == set(expected)
    for key, tensor in expected.items():
        # Scores are float32 whatever the masks are: of two masks that close, one may be rounded up and one down.
        rounding = torch.finfo(torch.float32).eps * float(tensor.abs().max()) if key.endswith(".scores") else 0.0
        assert float((actual[key] - tensor).abs().max()) <= tolerance + rounding, (name, key)


@pytest.mark.parametrize("name", [name for name in RUNS if name != "nested"])
def test_two_processes_are_one_that_accumulates_twice_as_many(two, name):
    result = run(changed(RUNS[name], gradient_accumulation=2 * RUNS[name].gradient_accumulation))
    expected, steps = kept(result), len(result.history)
    tolerance = bound(max(ACIP.mask_learning_rate, ACIP.adapter_learning_rate), steps, torch.float64)
    names = [name] if name != "acip" else ["acip", "acip-sharded", "acip-sharded-recomputed"]
    for each in names:
        actual, about = made(two, each)
        assert_near(each, actual, expected, tolerance)
        assert [row["pruned"] for row in about["history"]] == [row["pruned"] for row in result.history]
        assert [row["loss"] for row in about["history"]] == pytest.approx([row["loss"] for row in result.history])


def test_two_processes_are_one_with_twice_the_batch(two):
    twice = batches() * 2
    pairs = [
        {"input_ids": torch.cat([one["input_ids"], other["input_ids"]])}
        for one, other in zip(twice[::2], twice[1::2], strict=True)
    ]
    result = run(RUNS["acip-no-dropout"], pairs)
    tolerance = bound(max(ACIP.mask_learning_rate, ACIP.adapter_learning_rate), len(result.history), torch.float64)
    assert_near("acip", made(two, "acip-no-dropout")[0], kept(result), tolerance)


def test_nested_training_of_two_processes_is_that_of_one(two, tmp_path):
    """Its scores, and what was trained: of float32, by gradients in float64."""
    result = run(changed(NESTED, gradient_accumulation=2), output=tmp_path / "run")
    expected = files.read_tensors(tmp_path / "run" / CHECKPOINT)
    actual = files.read_tensors(two / "0" / "nested-run" / CHECKPOINT)
    trained = [key for key in expected if key.startswith("parameter.")]
    assert trained
    tolerance = bound(NESTED.learning_rate, NESTED.steps, torch.float32)
    for key in trained:
        assert float((actual[key] - expected[key]).abs().max()) <= tolerance, key
    for name in ("nested", "nested-sharded", "nested-sharded-recomputed"):
        factors, about = made(two, name)
        assert all(torch.equal(factors[key], value) for key, value in kept(result).items() if key.endswith(".scores"))
        assert [row["loss"] for row in about["history"]] == pytest.approx([row["loss"] for row in result.history])
        sizes = [row["size_ratio"] for row in result.history]
        assert [row["size_ratio"] for row in about["history"]] == sizes


@pytest.mark.parametrize("name", RANKINGS)
def test_a_ranking_has_the_same_bits_for_any_number_of_processes(two, name):
    actual, expected = made(two, name)[0], kept(run(RANKINGS[name]))
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("name", SHARDED)
def test_each_process_holds_its_part_of_the_factors(two, name):
    """To the byte what the formula says, after every step: the toy's tensors have even numbers of rows."""
    method = name.partition("-")[0]
    expected = run_memory(*SHAPES, method=method, processes=2, shard=True, itemsize=8)
    for rank in range(2):
        held = files.read_json(two / str(rank) / f"{name}-held.json")["bytes"]
        assert held and set(held) == {expected["factors"] + expected["teacher"]}


SHAPES = ([(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)] * 2, 0)


@pytest.mark.parametrize("method", ["acip", "nested"])
def test_the_formula_of_a_runs_memory(method):
    """Against what one process holds after a step, with everything computed."""
    held, model = [], toys.llama()

    def look(row):
        if row["step"] == 0:
            layers = [m for m in model.modules() if isinstance(m, SVDLinear | NestedLinear)]
            for layer in layers:
                if isinstance(layer, NestedLinear):
                    layer.updated()
            trained = [p for layer in layers for p in layer.parameters() if p.requires_grad]
            held.append((frozen_bytes(model), 4 * sum(p.numel() * p.element_size() for p in trained)))

    config = NESTED if method == "nested" else changed(ACIP, compact_every=0, route="factored")
    run(changed(config, dtype="float32"), model=model, on_step=look)
    rank = NESTED.update_rank if method == "nested" else ACIP.adapter_rank
    expected = run_memory(*SHAPES, method=method, rank=rank, itemsize=4)
    assert held == [(expected["factors"] + expected["teacher"], expected["trained"])]
    with pytest.raises(ValueError, match="method must be nested or acip"):
        run_memory(*SHAPES, method="svd")


@pytest.mark.parametrize("name", RESUMED)
def test_a_signal_to_one_stops_all_and_the_run_goes_on_to_the_same_bits(two, name):
    (expected, history), (actual, resumed) = made(two, name), made(two, f"{name}-resumed")
    assert all(torch.equal(actual[key], tensor) for key, tensor in expected.items())
    assert resumed == history


def test_the_first_process_alone_writes(two):
    mine = {path.name for path in (two / "0" / "nested-run").iterdir()} - {".lock"}
    assert mine == {CHECKPOINT, HISTORY, RANKING}
    assert not (two / "1" / "nested-run").exists() and not (two / "1" / "acip-run").exists()


def test_one_process_goes_on_with_the_run_of_two(two, tmp_path):
    """From a checkpoint in the middle, when its steps take as many batches."""
    config = changed(ACIP, checkpoint_seconds=0)

    def stop(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(changed(config, gradient_accumulation=2), output=tmp_path / "run", on_step=stop)
    # What a run of two processes would have written, as the test of their bits shows.
    with pytest.raises(ValueError, match=r"2 batches a step, and 1 process\(es\)"):
        run(config, output=tmp_path / "run", resume=True)
    about = files.read_json(two / "0" / "acip.json")
    result = run(changed(config, gradient_accumulation=2), output=tmp_path / "run", resume=True)
    assert [row["pruned"] for row in result.history] == [row["pruned"] for row in about["history"]]


# ---- tensor parallel


@pytest.mark.parametrize("form", ["factors", "pivoted"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_materialized_model_is_divided_by_transformers_plan(two, kind, form):
    name = f"tensor-parallel-{kind}-{form}"
    model = load(two / name)
    layers = [module for module in model.model.layers.modules() if isinstance(module, LowRankLinear | PivotLinear)]
    dense = 14 - len(layers)
    assert layers and dense and all(isinstance(layer, PivotLinear) == (form == "pivoted") for layer in layers)
    whole = sum(parameter.numel() for parameter in model.model.layers.parameters())
    generated = model.generate(toys.token_ids(), max_new_tokens=4, do_sample=False)
    for rank in range(2):
        made_there, about = made(two, name, rank)
        toys.assert_close(made_there["logits"], toys.logits(model))
        assert torch.equal(made_there["generated"], generated)
        # Of a layer, one of its factors is divided, and of a pivoted one by its outputs none.
        assert about["numbers"] < (0.75 if form == "factors" else 0.9) * whole


# ---- without the others


def test_a_process_that_dies_takes_the_others_with_it(tmp_path):
    """At once, by its closed connection; what it was doing with them raises."""
    started = time.monotonic()
    both(lose_one, tmp_path, exits=(0, -signal.SIGKILL))
    assert time.monotonic() - started < 120
    assert (tmp_path / "0" / "run" / HISTORY).exists()


def test_torchrun_is_stopped_by_ctrl_c_and_goes_on(tmp_path):
    """By the page's first command, of a toy and with two processes."""
    toys.llama(max_position_embeddings=128).save_pretrained(tmp_path / "toy")
    toys.tokenizer().save_pretrained(tmp_path / "toy")
    (tmp_path / "text.txt").write_text(toys.text())
    output = tmp_path / "run"
    line, _ = re.findall(r"^```sh\n(torchrun .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    here = {"meta-llama/Llama-2-7b-hf": tmp_path / "toy", "c4": tmp_path / "text.txt", "runs/llama": output}
    here |= {"8": 2, "400": 120, "torchrun": "torch.distributed.run"}
    words = [str(here.pop(word, word)) for word in shlex.split(line)]
    assert not here
    arguments = words[words.index("compress") :]
    arguments += ["--json", "--batch-size", "2", "--length", "16", "--device", "cpu", "--dtype", "float32"]
    command = [sys.executable, "-m", *words[: words.index("compress")]]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        [*command, *arguments], start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        while process.poll() is None and not (output / HISTORY).exists():
            time.sleep(0.05)
        # As a terminal does it: to torchrun and to its processes, whom torchrun sends another.
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert stderr.count("stopped after step") == 1, stderr
    done = len((output / HISTORY).read_text().splitlines())
    assert (output / CHECKPOINT).exists() and done < 120

    files.write_json(tmp_path / "arguments.json", {})
    (tmp_path / "arguments.json").write_text(json.dumps([*arguments, "--resume"]))
    both(on_the_command_line, tmp_path)
    summary = json.loads((tmp_path / "0" / "stdout").read_text())
    assert summary["steps"] == 120 and load(summary["elastic"], 0.5)
    assert (tmp_path / "1" / "stdout").read_text() == (tmp_path / "1" / "stderr").read_text() == ""


def test_one_process_alone_has_no_others(monkeypatch):
    alone = Processes(torch.device("cpu"))
    tensor = torch.ones(2)
    alone.sum_([tensor])
    assert alone.main and tensor.tolist() == [1, 1] and alone.any(True, False) == (True, False)
    assert alone.owners({"a": 1.0, "b": 2.0}) == {"a": 0, "b": 0}
    with pytest.raises(ValueError, match="shard: the factors are divided among several processes"):
        run(SHARDED["acip-sharded"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device must be cuda for several processes"), joined("cuda:1"):
        pass


def test_decompositions_are_divided_by_their_cost(two):
    """And each process has made its own alone, as its cache shows."""
    made_here = [{path.name for path in (two / str(rank) / "svd").iterdir()} for rank in range(2)]
    assert len(made_here[0]) == len(made_here[1]) == 7 and not made_here[0] & made_here[1]
    costs = {"a": 1.0, "b": 8.0, "c": 3.0, "d": 3.0, "e": 1.0}
    assert Processes(torch.device("cpu"), 0, 2).owners(costs) == {"b": 0, "c": 1, "d": 1, "a": 1, "e": 1}


def test_other_commands_say_that_they_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["acip", "info"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "only `acip compress` and `run` are for several processes" in capsys.readouterr().err
