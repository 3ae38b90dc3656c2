"""Many processes: two of them, by gloo, against one; what they write, how they stop and go on, what they refuse."""

import json
import multiprocessing
import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist
import toys

from acip_kernels import CompressionConfig, NestedConfig, RankingConfig, compress, files
from acip_kernels.compress.factorize import svd_layers
from acip_kernels.compress.loop import CHECKPOINT, HISTORY
from acip_kernels.compress.nested import RANKING
from acip_kernels.nn.sharded import Sharded

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
RUNS = {
    "acip": ACIP,
    "acip-activations": CompressionConfig.from_dict(ACIP.to_dict() | {"basis": "activations"}),
    "nested": NESTED,
}


def changed(config, **changes):
    return type(config).from_dict(config.to_dict() | changes)


def batches(size=2):
    return [{"input_ids": toys.token_ids(batch=size, seed=seed)} for seed in range(COUNT)]


def run(config, data=None, **options):
    return compress(toys.llama(), batches() if data is None else data, config, progress=False, **options)


def kept(result):
    """What a run has made, by name."""
    return {
        f"{name}.{key}": getattr(layer, key).detach().contiguous()
        for name, layer in svd_layers(result.model).items()
        for key in ("scores", "mask", "S", "U", "Vh", "lora_A", "lora_B")
        if hasattr(layer, key)
    }


def without_time(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


# ---- what each of the two processes does


def work(rank, directory, out):
    """Every run, into `out`, this process's directory."""

    def keep(name, result):
        files.write_tensors(out / f"{name}.safetensors", kept(result))
        files.write_json(out / f"{name}.json", {"history": without_time(result.history), "ratio": result.size_ratio})

    for name, config in RUNS.items():
        keep(name, run(config))
        keep(f"{name}-sharded", run(changed(config, shard=True)))
    for name, config in RANKINGS.items():
        keep(name, run(config))
    keep("acip-float32", run(changed(ACIP, dtype="float32")))
    keep("nested-float32", run(changed(NESTED, dtype="float32")))

    for name in ("acip", "nested"):
        # To each its own directory: what the second one's holds at the end, it has written.
        output = out / f"{name}-run"

        def stop(row):
            if row["step"] == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

        with pytest.raises(KeyboardInterrupt, match="stopped after step 3"):
            run(RUNS[name], output=output, on_step=stop)
        keep(f"{name}-resumed", run(RUNS[name], output=output, resume=True))
    refuse(rank, out)


def refuse(rank, out):
    with pytest.raises(ValueError, match="config.seed is 0 for rank 0 and 1 for rank 1; start all of them"):
        run(changed(ACIP, seed=rank))
    with pytest.raises(ValueError, match=r"model.model.embed_tokens.weight is .* for rank 1; .* differences more\); start all"):
        compress(toys.llama(seed=rank), batches(), ACIP, progress=False)
    with pytest.raises(ValueError, match="batches is .*; give all of them the same batches"):
        run(ACIP, batches()[rank:])
    with pytest.raises(ValueError, match="holds the checkpoint of a run"):
        run(ACIP, output=out / "acip-run")
    with pytest.raises(ValueError, match=r"2 batches a step, and 2 process\(es\) with a gradient_accumulation of 2"):
        run(changed(ACIP, gradient_accumulation=2), output=out / "acip-run", resume=True)
    # The first one's disk is full; the second has nothing to do with it, and is told.
    write = files.write_tensors
    files.write_tensors = lambda *arguments: exec('raise OSError(28, "no space left")')
    try:
        with pytest.raises(OSError, match="no space left"):
            run(changed(ACIP, checkpoint_seconds=0), output=out / "full")
    finally:
        files.write_tensors = write


def start(rank, function, directory):
    """A process of two, forked from one that has imported everything."""
    torch.set_num_threads(1)
    out = directory / str(rank)
    out.mkdir()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    try:
        with pytest.raises(ValueError, match="WORLD_SIZE is 2, but there is no process group"):
            run(ACIP)
        dist.init_process_group("gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=2)
        function(rank, directory, out)
    except BaseException:
        files.write_text(out / "failed", traceback.format_exc())
        raise
    dist.destroy_process_group()


def both(function, directory):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_processes"])
    two = [context.Process(target=start, args=(rank, function, directory)) for rank in range(2)]
    for process in two:
        process.start()
    for process in two:
        process.join(300)
        process.kill()
    failures = [file.read_text() for file in sorted(directory.glob("*/failed"))]
    assert not failures, "\n".join(failures)
    assert [process.exitcode for process in two] == [0, 0]
    return directory


# ---- what came of it


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return both(work, tmp_path_factory.mktemp("two"))


def made(directory, rank, name):
    about = files.read_json(directory / str(rank) / f"{name}.json")
    return files.read_tensors(directory / str(rank) / f"{name}.safetensors"), about["history"], about["ratio"]


def names():
    sharded = [f"{name}-sharded" for name in RUNS]
    return [*RUNS, *sharded, *RANKINGS, "acip-float32", "nested-float32", "acip-resumed", "nested-resumed"]


@pytest.mark.parametrize("name", names())
def test_all_processes_have_the_same_bits(two, name):
    (first, *about), (second, *same) = (made(two, rank, name) for rank in range(2))
    assert about == same
    assert list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


if __name__ == "__main__":
    import pathlib, tempfile
    both(work, pathlib.Path(tempfile.mkdtemp()))
