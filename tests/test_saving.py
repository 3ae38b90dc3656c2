"""Checkpoints, elastic and materialized: what they hold, that they load as they were, and what is refused."""

import copy
import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from toys import assert_close, logits
from transformers import AutoModelForCausalLM

import acip_kernels
from acip_kernels import (
    CompressionConfig,
    CompressionResult,
    LowRankLinear,
    PivotLinear,
    SVDLinear,
    load,
    materialize,
    save,
)
from acip_kernels.compress.factorize import svd_layers

SIZES = (1.0, 0.8, 0.5, 0.1)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def make_base(root, name):
    """The dense model's directory: what a user has before compressing."""
    path = root / f"{name}-base"
    if not path.exists():
        toys.MODELS[name]().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=toys.MODELS)
def saved(request, root):
    """`(result, elastic, compact, base)` of each architecture; nothing may write into these."""
    name = request.param
    base = make_base(root, name)
    result = toys.toy_result(AutoModelForCausalLM.from_pretrained(base))
    elastic, compact = root / f"{name}-elastic", root / f"{name}-compact"
    result.save(elastic)
    result.save(compact, compact=True)
    return result, elastic, compact, base


@pytest.fixture(scope="module")
def llama(root):
    result = toys.toy_result(AutoModelForCausalLM.from_pretrained(make_base(root, "llama")))
    if not (root / "one").exists():
        result.save(root / "one" / "elastic")
        result.save(root / "one" / "compact", compact=True)
        save(materialize(result, 0.5), root / "one" / "materialized")
    return result


def ranks(model):
    return {
        name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear | PivotLinear)
    }


def dtypes(model):
    """Of its numbers; a pivoted layer's bits are none."""
    return {tensor.dtype for name, tensor in model.state_dict().items() if not name.endswith("is_pivot")}


def weights(path):
    """Every tensor of every weight file, by name; a name in two files is an error."""
    tensors = {}
    for file in sorted(path.glob("*.safetensors")):
        new = load_file(file)
        assert not new.keys() & tensors.keys()
        tensors |= new
    return tensors


def assert_same_state(model, other):
    state, expected = model.state_dict(), other.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name


# ---- elastic


@pytest.mark.parametrize("kind", ["elastic", "compact"])
@pytest.mark.parametrize("size_ratio", SIZES)
def test_any_size_loads_as_it_is_cut_in_memory(saved, kind, size_ratio):
    result, elastic, compact, _ = saved
    model, expected = load(elastic if kind == "elastic" else compact, size_ratio), materialize(result, size_ratio)
    assert ranks(model) == ranks(expected)
    assert not any(isinstance(module, SVDLinear) for module in model.modules())
    assert [type(module) for module in model.modules()] == [type(module) for module in expected.modules()]
    assert not model.training
    about = [one.config.to_dict().get("quantization_config") for one in (model, expected)]
    assert about[0] == about[1]
    assert_close(logits(model), logits(expected))


@pytest.mark.parametrize(
    "options",
    [
        {"count": "stored", "size_ratio": 0.7},
        {"adapters": "truncate"},
        {"adapters": "drop"},
        {"rank_multiple": 8, "size_ratio": 0.6},
    ],
)
def test_options_mean_the_same_as_in_memory(saved, options):
    result, elastic, _, _ = saved
    options = {"size_ratio": 0.5} | options
    model, expected = load(elastic, **options), materialize(result, **options)
    assert ranks(model) == ranks(expected)
    assert_close(logits(model), logits(expected))


def test_the_factorized_model_comes_back(saved, caplog):
    result, elastic, _, _ = saved
    with caplog.at_level(logging.WARNING):
        again = CompressionResult.load(elastic)
    assert not caplog.records  # nothing missing or unexpected
    layers = svd_layers(again.model)
    for name, layer in svd_layers(result.model).items():
        order = layer.scores.sort(descending=True).indices
        for key in ("scores", "S"):
            assert torch.equal(getattr(layers[name], key), getattr(layer, key)[order])
        for key in ("lora_A", "lora_B"):
            assert torch.equal(getattr(layers[name], key), getattr(layer, key))
        assert torch.equal(layers[name].live, layer.scores[order] > 0)
        assert layers[name].adapter_scaling == layer.adapter_scaling
    for size_ratio in (0.6, 1.0, 0.4):
        assert_close(logits(again.at(size_ratio)), logits(result.at(size_ratio)))


def test_config_history_and_final_ratio_survive(llama, tmp_path):
    config = CompressionConfig.short(7, 0.37, exclude=("k_proj",))
    history = [{"step": step, "phase": "prune", "loss": 0.1 * step, "size_ratio": 1 / (step + 1)} for step in range(5)]
    CompressionResult(llama.model, config, history, 0.3683).save(tmp_path / "elastic")
    again = CompressionResult.load(tmp_path / "elastic")
    assert (again.config, again.history, again.size_ratio) == (config, history, 0.3683)
    card = (tmp_path / "elastic" / "README.md").read_text()
    assert "| run ended at | 0.3683 |" in card and "| stop_ratio | 0.37 |" in card
    assert CompressionResult.load(llama_path(llama, "elastic")).config is None


def llama_path(result, kind):
    """A directory of the `llama` fixture."""
    from pathlib import Path

    return Path(result.model.config._name_or_path).parent / "one" / kind


@pytest.mark.parametrize("kind", ["elastic", "compact"])
def test_a_loaded_result_can_be_saved_again(saved, kind, tmp_path):
    result, elastic, compact, base = saved
    first = elastic if kind == "elastic" else compact
    CompressionResult.load(first).save(tmp_path / "elastic")
    CompressionResult.load(first).save(tmp_path / "compact", compact=True, base_model=str(base))
    if kind == "elastic":
        original, again = weights(elastic), weights(tmp_path / "elastic")
        assert original.keys() == again.keys()
        assert all(torch.equal(tensor, again[name]) for name, tensor in original.items())
    else:
        CompressionResult.load(compact).save(tmp_path / "same", compact=True)  # it knows its base model
        assert_close(logits(load(tmp_path / "same", 0.5)), logits(materialize(result, 0.5)))
    for path in (tmp_path / "elastic", tmp_path / "compact"):
        assert_close(logits(load(path, 0.5)), logits(materialize(result, 0.5)))


def test_a_compact_checkpoint_holds_scores_and_adapters_alone(saved):
    _, _, compact, _ = saved
    assert {name.rsplit(".", 1)[-1] for name in weights(compact)} == {"scores", "S", "lora_A", "lora_B"}


def test_a_compact_checkpoint_keeps_decompositions_where_it_is_told(llama, tmp_path, monkeypatch):
    path, cache = llama_path(llama, "compact"), tmp_path / "svd"
    first = load(path, 0.5, svd_cache=cache)
    assert len(list(cache.iterdir())) == len(llama.scores)

    def fail(*args, **kwargs):
        raise AssertionError("decomposed although it is in the cache")

    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert torch.equal(logits(load(path, 0.5, svd_cache=cache)), logits(first))


def test_a_compact_checkpoint_refuses_another_base_model(llama, tmp_path):
    path = llama_path(llama, "compact")
    shutil.copytree(llama.model.config._name_or_path, tmp_path / "moved")
    assert_close(logits(load(path, 0.5, base_model=tmp_path / "moved")), logits(materialize(llama, 0.5)))
    toys.llama(seed=1).save_pretrained(tmp_path / "other")
    toys.llama(intermediate_size=40).save_pretrained(tmp_path / "narrower")
    toys.llama(num_hidden_layers=1).save_pretrained(tmp_path / "shorter")
    for other, message in (
        ("other", "made from another model than .*other: model.layers.0.self_attn.q_proj differs"),
        ("narrower", "made from another model than .*narrower"),
        ("shorter", r"no linear layer 'model\.layers\.1"),
        ("nowhere", "base model cannot be loaded; give base_model"),
    ):
        with pytest.raises(ValueError, match=message):
            load(path, 0.5, base_model=str(tmp_path / other))


def test_compact_needs_to_know_the_base_model(llama, tmp_path):
    with pytest.raises(ValueError, match="which base_model"):
        toys.toy_result(toys.llama()).save(tmp_path / "a", compact=True)  # made in memory
    with pytest.raises(ValueError, match="which base_model"):
        CompressionResult.load(llama_path(llama, "elastic")).save(tmp_path / "a", compact=True)
    with pytest.raises(ValueError, match="activations"):
        config = CompressionConfig(basis="activations")
        CompressionResult(llama.model, config).save(tmp_path / "a", compact=True)
    with pytest.raises(ValueError, match="no scores"):
        save(materialize(llama, 0.5), tmp_path / "a", compact=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("compact", [False, True])
def test_a_bfloat16_result_keeps_its_precise_parts(root, compact, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_base(root, "llama"), dtype=torch.bfloat16)
    result = toys.toy_result(model)
    result.save(tmp_path / "elastic", compact=compact)
    again = CompressionResult.load(tmp_path / "elastic")
    assert again.model.dtype == torch.bfloat16
    for name, layer in svd_layers(again.model).items():
        assert (layer.U.dtype, layer.S.dtype, layer.scores.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        assert torch.equal(layer.scores.sort().values, result.scores[name].sort().values)
    # In two factors: which rows are pivots depends on the order of the ranks.
    two = {"forms": ("dense", "factors")}
    loaded, expected = load(tmp_path / "elastic", 0.5, **two), materialize(result, 0.5, **two)
    assert ranks(loaded) == ranks(expected)
    for name in ranks(expected):
        # The same ranks in another order, each rounded once.
        layer, same = (model.get_submodule(name).double().effective_weight() for model in (loaded, expected))
        torch.testing.assert_close(layer, same, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, "bfloat16"])
def test_an_elastic_checkpoint_loads_in_the_dtype_asked_for(llama, dtype):
    expected = torch.bfloat16 if dtype == "bfloat16" else dtype
    path = llama_path(llama, "elastic")
    assert {p.dtype for p in load(path, 0.5, dtype=dtype).parameters()} == {expected}
    layer = next(iter(svd_layers(load(path, dtype=dtype)).values()))
    assert layer.U.dtype == expected
    assert layer.scores.dtype.itemsize >= 4 and layer.lora_A.dtype.itemsize >= 4


def test_an_elastic_checkpoint_in_shards(llama, tmp_path):
    save(llama, tmp_path / "elastic", max_shard_size="20KB")
    shards = sorted((tmp_path / "elastic").glob("elastic-*.safetensors"))
    assert len(shards) > 3
    for size_ratio in (0.8, 0.3):
        assert_close(logits(load(tmp_path / "elastic", size_ratio)), logits(materialize(llama, size_ratio)))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} is missing"):
        load(tmp_path / "elastic", 0.8)


def test_a_materialized_checkpoint_in_shards(llama, tmp_path):
    model = materialize(llama, 0.5)
    save(model, tmp_path / "model", max_shard_size="20KB")
    shards = sorted((tmp_path / "model").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert_same_state(load(tmp_path / "model"), model)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"{shards[1].name} is missing"):
        load(tmp_path / "model")


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_an_elastic_checkpoint_loads_onto_a_device(llama, device_map):
    path = llama_path(llama, "elastic")
    assert_close(logits(load(path, 0.5, device_map=device_map)), logits(materialize(llama, 0.5)))
    assert isinstance(load(path, device_map=device_map), type(llama.model))


# ---- tied embeddings


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gemma3"])
def test_tied_embeddings_are_one_tensor_in_file_and_memory(root, name, tmp_path):
    result = toys.toy_result(AutoModelForCausalLM.from_pretrained(make_base(root, name)))
    result.save(tmp_path / "elastic")
    save(materialize(result, 0.5), tmp_path / "model")
    load(tmp_path / "elastic", 0.5).save_pretrained(tmp_path / "again")
    for path in ("elastic", "model", "again"):
        shapes = [list(tensor.shape) for tensor in weights(tmp_path / path).values()]
        assert shapes.count([toys.VOCABULARY, 32]) == 1 + (name == "gpt2")  # GPT-2 has 64 positions, too
    for model in (
        load(tmp_path / "elastic"),
        load(tmp_path / "elastic", 0.5),
        load(tmp_path / "model"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        copy.deepcopy(materialize(result, 0.5)),
    ):
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert head is embedding and head.data_ptr() == embedding.data_ptr()


# ---- materialized, by stock transformers


@pytest.mark.parametrize("size_ratio", [0.8, 0.4])
def test_stock_transformers_loads_a_materialized_model(saved, size_ratio, tmp_path):
    result = saved[0]
    model = materialize(result, size_ratio)
    save(model, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert_same_state(load(tmp_path / "model"), model)
    assert ranks(loaded) == ranks(model) != {}
    ids = toys.token_ids(1, 5)
    generated = loaded.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(generated, model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert generated.shape == (1, 11)

    loaded.save_pretrained(tmp_path / "again")
    before, after = weights(tmp_path / "model"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert_same_state(again, model)
    assert again.config.quantization_config.ranks == ranks(model)


@pytest.fixture(scope="module")
def low_rank(llama):
    return llama_path(llama, "materialized")


@pytest.mark.parametrize("options", [{"device_map": "cpu"}, {"device_map": "auto"}, {"dtype": torch.float32}])
def test_options_of_from_pretrained(llama, low_rank, options):
    model = AutoModelForCausalLM.from_pretrained(low_rank, **options)
    assert_same_state(model, materialize(llama, 0.5))


def test_dtypes_are_honoured(llama, low_rank):
    model = AutoModelForCausalLM.from_pretrained(low_rank, dtype=torch.bfloat16)
    assert dtypes(model) == {torch.bfloat16}
    assert_same_state(model, materialize(llama, 0.5, dtype=torch.bfloat16))
    assert torch.isfinite(logits(model)).all()


def test_a_loaded_model_is_an_ordinary_one(llama, low_rank, tmp_path):
    from transformers import Trainer, TrainingArguments

    for model in (AutoModelForCausalLM.from_pretrained(low_rank), load(low_rank), materialize(llama, 0.5)):
        assert model.is_quantized is False
        expected = logits(model)
        assert torch.equal(logits(copy.deepcopy(model)), expected)
        half = copy.deepcopy(model).half()
        assert dtypes(half) == {torch.float16}
        assert dtypes(half.float()) == {torch.float32}
        Trainer(model, TrainingArguments(output_dir=str(tmp_path / "trainer"), use_cpu=True, report_to=[]))
        model(input_ids=toys.token_ids(), labels=toys.token_ids()).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def test_save_pretrained_refuses_a_factorized_model(llama, tmp_path, caplog):
    for model in (llama.model, load(llama_path(llama, "elastic")), load(llama_path(llama, "compact"))):
        with caplog.at_level(logging.WARNING, "acip_kernels"), pytest.raises(ValueError, match="not serializable"):
            model.save_pretrained(tmp_path / "model")
        assert "materialize() it at a size first" in caplog.text
        assert not list(tmp_path.rglob("*.safetensors"))


def test_from_pretrained_of_an_elastic_checkpoint_says_what_to_do(llama):
    for kind in ("elastic", "compact"):
        with pytest.raises(ValueError, match=r"acip_kernels\.load\(directory, size_ratio"):
            AutoModelForCausalLM.from_pretrained(llama_path(llama, kind))


def test_a_materialized_checkpoint_has_one_size(llama, low_rank):
    with pytest.raises(ValueError, match="not an elastic checkpoint but has one size at 0.5"):
        load(low_rank, 0.6)
    with pytest.raises(ValueError, match="not an elastic checkpoint"):
        load(llama.model.config._name_or_path, 0.6)
    with pytest.raises(ValueError, match="not an elastic checkpoint"):
        CompressionResult.load(low_rank)
    assert_same_state(load(llama.model.config._name_or_path), toys.llama())  # any transformers directory


def test_without_our_import_a_model_loads_right_or_not_at_all(root, llama, tmp_path):
    """Plain transformers in a process of its own: all-dense models load, the others end it with an error."""
    wrong = [llama_path(llama, "elastic"), llama_path(llama, "compact")]
    right = []
    for name in ("llama", "gpt2"):
        result = toys.toy_result(AutoModelForCausalLM.from_pretrained(make_base(root, name)))
        save(materialize(result, 0.6), tmp_path / f"{name}-low")
        AutoModelForCausalLM.from_pretrained(tmp_path / f"{name}-low").save_pretrained(tmp_path / f"{name}-again")
        for size_ratio in (0.6, 1.0):  # the latter all dense
            save(materialize(result, size_ratio, quantize="int8"), tmp_path / f"{name}-int8-{size_ratio}")
            wrong.append(tmp_path / f"{name}-int8-{size_ratio}")
        wrong += [tmp_path / f"{name}-low", tmp_path / f"{name}-again"]
        save(materialize(result, 1.0), tmp_path / f"{name}-dense")
        assert "quantization_config" not in json.loads((tmp_path / f"{name}-dense" / "config.json").read_text())
        torch.save(logits(materialize(result, 1.0)), tmp_path / f"{name}-dense" / "expected.pt")
        right.append(tmp_path / f"{name}-dense")
    # One import for all of them: each is loaded in a fork, whose exit status is what that program's would be.
    program = """if True:
        import multiprocessing, os, sys, torch
        from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM

        torch.set_num_threads(1)

        def one(path):
            model = AutoModelForCausalLM.from_pretrained(path)
            if os.path.exists(path + "/expected.pt"):
                ids = torch.load(sys.argv[1])
                with torch.no_grad():
                    assert torch.equal(model(input_ids=ids).logits, torch.load(path + "/expected.pt"))

        assert "acip_kernels" not in sys.modules
        for path in sys.argv[2:]:
            process = multiprocessing.get_context("fork").Process(target=one, args=(path,))
            process.start()
            process.join()
            print("STATUS", process.exitcode)
    """
    torch.save(toys.token_ids(), tmp_path / "ids.pt")
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "ids.pt"), *map(str, wrong + right)],
        capture_output=True,
        text=True,
        timeout=120,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    statuses = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert statuses == [1] * len(wrong) + [0] * len(right), done.stderr


# ---- the card, and paths


@pytest.mark.parametrize("kind", ["elastic", "materialized"])
def test_no_file_names_a_directory_of_this_machine(llama, kind):
    path = llama_path(llama, kind)
    for file in path.iterdir():
        assert str(path.parents[1]).encode() not in file.read_bytes(), file.name
    card = (path / "README.md").read_text()
    assert "compressed with ACIP" in card and "import acip_kernels" in card


def test_the_card_of_a_hub_model_names_it(llama, tmp_path):
    save(materialize(llama, 0.5, adapters="truncate"), tmp_path / "model", base_model="someone/Some-Model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert "base_model: someone/Some-Model\n" in card and "# Some-Model" not in card
    assert "50 % of their size" in card and "| adapters | truncate |" in card
    llama_fields = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert f"| size ratio, factorized count | {llama_fields['factorized']:.4f} |" in card
    llama.save(tmp_path / "elastic", base_model="someone/Some-Model")
    CompressionResult.load(tmp_path / "elastic").save(tmp_path / "again")
    assert "base_model: someone/Some-Model\n" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["elastic", "compact", "materialized"])
def test_names_with_spaces_and_signs_and_directories_without_write_access(llama, kind, tmp_path):
    path = tmp_path / "ein Modell, 50 %" / "größe×λ 模型"
    model = materialize(llama, 0.5)
    save(model if kind == "materialized" else llama, path, compact=kind == "compact")
    for file in path.iterdir():
        file.chmod(0o444)
    path.chmod(0o555)
    before = sorted(file.name for file in path.iterdir())
    try:
        assert_close(logits(load(path) if kind == "materialized" else load(path, 0.5)), logits(model))
        assert sorted(file.name for file in path.iterdir()) == before  # nothing is written even where root could
    finally:
        path.chmod(0o755)


# ---- writing that goes wrong


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["elastic", "materialized"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_save_leaves_what_was_there(llama, kind, overwrite, error, tmp_path, monkeypatch):
    path = tmp_path / "model"
    if overwrite:
        shutil.copytree(llama_path(llama, kind), path)
    before = {file.name: file.read_bytes() for file in path.iterdir()} if overwrite else {}

    def fail(*args, **kwargs):
        raise error

    # The last thing that is written: everything else is there already.
    monkeypatch.setattr("acip_kernels.models.saving.model_card", fail)
    with pytest.raises(type(error)):
        save(materialize(llama, 0.7) if kind == "materialized" else llama, path, overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == (["model"] if overwrite else [])
    if overwrite:
        assert {file.name: file.read_bytes() for file in path.iterdir()} == before


def test_a_full_disk_is_an_oserror(llama, tmp_path, monkeypatch):
    import huggingface_hub.serialization._torch as serialization
    import safetensors.torch
    from safetensors import SafetensorError

    def full(*args, **kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    monkeypatch.setattr(serialization, "safe_save_file", full, raising=False)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    for model in (llama, materialize(llama, 0.5)):
        with pytest.raises(OSError, match="cannot write .*No space left"):
            save(model, tmp_path / "model")
        assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_not_overwritten_unless_told(llama, tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        llama.save(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        llama.save(tmp_path / "notes", overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["notes"]
    llama.save(tmp_path / "model")
    save(materialize(llama, 0.5), tmp_path / "model", overwrite=True)
    assert not list((tmp_path / "model").glob("elastic*"))  # nothing of the earlier one is mixed in
    assert_same_state(load(tmp_path / "model"), materialize(llama, 0.5))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "notes"]


def test_only_transformers_models_are_saved(tmp_path):
    with pytest.raises(TypeError, match="got Sequential"):
        save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "model")


# ---- files that are not what they should be


def weight_file(path):
    return next(path.glob("*.safetensors"))


def with_tensors(change):
    def apply(path):
        tensors = load_file(weight_file(path))
        change(tensors)
        save_file(tensors, weight_file(path), {"format": "pt"})

    return apply


def with_fields(change):
    def apply(path):
        fields = json.loads((path / "config.json").read_text())
        change(fields, fields["quantization_config"])
        (path / "config.json").write_text(json.dumps(fields))

    return apply


def with_bytes(name, change):
    def apply(path):
        file = weight_file(path) if name == "weights" else path / name
        file.write_bytes(change(file.read_bytes()))

    return apply


UP = "model.layers.0.mlp.up_proj"
ALL, ELASTIC, STORED, MATERIALIZED = (
    ("elastic", "compact", "materialized"),
    ("elastic", "compact"),
    ("elastic",),
    ("materialized",),
)
WRONG = {
    "truncated": (ALL, with_bytes("weights", lambda data: data[:-1000]), "safetensors file"),
    "cut in its header": (ALL, with_bytes("weights", lambda data: data[:300]), "safetensors file"),
    "empty file": (ALL, with_bytes("weights", lambda data: b""), "safetensors file"),
    "another format": (ALL, with_bytes("weights", lambda data: b"PK\x03\x04" + data), "safetensors file"),
    "a header of 2**60 bytes": (ALL, with_bytes("weights", lambda d: b"\0" * 7 + b"\x10" + d[8:]), "safetensors file"),
    "no weights": (ALL, lambda path: weight_file(path).unlink(), r"\.safetensors is missing"),
    "no config.json": (ALL, lambda path: (path / "config.json").unlink(), "config.json is missing"),
    "config.json is no JSON": (ALL, with_bytes("config.json", lambda data: data[:-9]), "config.json is not JSON"),
    "config.json is a list": (ALL, with_bytes("config.json", lambda data: b"[1]"), "does not hold a JSON object"),
    "no model_type": (ALL, with_fields(lambda top, ours: top.pop("model_type")), "no model_type"),
    "unknown model_type": (ALL, with_fields(lambda top, ours: top.update(model_type="nothing")), "describes no model"),
    "hidden_size is text": (ALL, with_fields(lambda top, ours: top.update(hidden_size="x")), "config.json"),
    "quantization_config is text": (
        ALL,
        with_fields(lambda top, ours: top.update(quantization_config="acip")),
        "quantization_config",
    ),
    "a newer format": (ALL, with_fields(lambda top, ours: ours.update(format_version=7)), "format_version is 7"),
    "format_version is text": (ALL, with_fields(lambda top, ours: ours.update(format_version="1")), "format_version"),
    "unknown kind": (ALL, with_fields(lambda top, ours: ours.update(kind="liquid")), "kind is 'liquid'"),
    "a kind of memory": (ALL, with_fields(lambda top, ours: ours.update(kind="factorized")), "kind is 'factorized'"),
    "a version of 1.0": (ALL, with_fields(lambda top, ours: ours.update(format_version=1.0)), "format_version is 1.0"),
    "a field named as a method": (ALL, with_fields(lambda top, ours: ours.update(to_dict=1)), "to_dict cannot be 1"),
    "a field named __class__": (ALL, with_fields(lambda top, ours: ours.update(__class__=1)), "__class__ cannot be 1"),
    "quant_method is a list": (
        ("elastic", "materialized"),
        with_fields(lambda top, ours: ours.update(quant_method=["acip"])),
        "no object with a quant_method",
    ),
    "config.json is a directory": (
        ALL,
        lambda path: ((path / "config.json").unlink(), (path / "config.json").mkdir()),
        "config.json cannot be read: Is a directory",
    ),
    "config.json says a thing twice": (
        ALL,
        with_bytes("config.json", lambda data: data.replace(b"{", b'{"vocab_size": 3,', 1)),
        "'vocab_size' occurs twice",
    ),
    "config.json is 60 deep": (
        ALL,
        with_bytes("config.json", lambda data: data.replace(b"{", b'{"x":' + b"[" * 60 + b"]" * 60 + b",", 1)),
        "config.json is nested more than 50 deep",
    ),
    "10**9 layers": (ALL, with_fields(lambda top, ours: top.update(num_hidden_layers=10**9)), "num_hidden_layers is"),
    "10**9 labels": (ALL, with_fields(lambda top, ours: top.update(num_labels=10**9)), "num_labels is 1000000000"),
    "50,000 layers": (
        ("elastic", "materialized"),
        with_fields(lambda top, ours: top.update(num_hidden_layers=50_000)),
        "describes no model: it has over .* weights, and the files hold",
    ),
    "heads of 2**40": (
        ("elastic", "materialized"),
        with_fields(lambda top, ours: top.update(head_dim=2**40)),
        "describes a model with tables of",
    ),
    "dtype is a function of torch": (ALL, with_fields(lambda top, ours: top.update(dtype="load")), "config.json.*"),
    "attention from the hub": (
        ALL,
        with_fields(lambda top, ours: top.update(_attn_implementation="someone/attention")),
        "'someone/attention', code from elsewhere",
    ),
    # Elastic.
    "scores are infinite": (ELASTIC, with_tensors(lambda t: t[f"{UP}.scores"].fill_(float("inf"))), "is not finite"),
    "singular values are NaN": (ELASTIC, with_tensors(lambda t: t[f"{UP}.S"].fill_(float("nan"))), "is not finite"),
    "scores are int64": (
        ELASTIC,
        with_tensors(lambda t: t.update({f"{UP}.scores": torch.zeros(32, dtype=torch.int64)})),
        f"{UP}.scores is I64, but must be one of BF16",
    ),
    "scores are of another byte order": (
        STORED,
        with_tensors(
            lambda t: t.update(
                {f"{UP}.scores": t[f"{UP}.scores"].view(torch.uint8).view(-1, 4).flip(1).view(torch.float32).flatten()}
            )
        ),
        f"{UP}.scores is not",
    ),
    "a factor is int8": (
        STORED,
        with_tensors(lambda t: t.update({f"{UP}.U": t[f"{UP}.U"].to(torch.int8)})),
        f"{UP}.U is I8",
    ),
    "a bias of a layer that has none": (
        STORED,
        with_tensors(lambda t: t.update({f"{UP}.bias": torch.zeros(48)})),
        f"{UP}.bias is there, the layer has no bias",
    ),
    "an adapter_alpha of 1e308": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(adapter_alpha=1e308)),
        r"adapter_alpha cannot be 1e\+308",
    ),
    "a mask_scale of 10**400": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(mask_scale=10**400)),
        "mask_scale cannot be 1000",
    ),
    "a mask_scale that is False": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(mask_scale=False)),
        "mask_scale cannot be False",
    ),
    "an adapter_rank that is True": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(adapter_rank=True)),
        "adapter_rank cannot be True",
    ),
    "base_model is a list": (
        ELASTIC,
        with_fields(lambda top, ours: ours.update(base_model=["a"])),
        r"base_model cannot be \['a'\]",
    ),
    "compact is text": (ELASTIC, with_fields(lambda top, ours: ours.update(compact="no")), "compact cannot be 'no'"),
    "final_size_ratio is NaN": (
        ELASTIC,
        with_fields(lambda top, ours: ours.update(final_size_ratio=float("nan"))),
        "final_size_ratio cannot be nan",
    ),
    "compression is a list": (
        ELASTIC,
        with_fields(lambda top, ours: ours.update(compression=[1])),
        r"compression cannot be \[1\]",
    ),
    "no scores": (ELASTIC, with_tensors(lambda t: t.pop(f"{UP}.scores")), f"{UP}.scores' is missing"),
    "no adapter": (ELASTIC, with_tensors(lambda t: t.pop(f"{UP}.lora_B")), f"{UP}.lora_B' is missing"),
    "no factor": (STORED, with_tensors(lambda t: t.pop(f"{UP}.Vh")), f"{UP}.Vh' is missing"),
    "no norm": (STORED, with_tensors(lambda t: t.pop("model.norm.weight")), "model.norm.weight' is missing"),
    "no head": (STORED, with_tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight' is missing"),
    "scores are NaN": (ELASTIC, with_tensors(lambda t: t[f"{UP}.scores"].fill_(float("nan"))), f"{UP}.scores"),
    "scores out of order": (STORED, with_tensors(lambda t: t[f"{UP}.scores"].neg_()), "not in falling order"),
    "a factor too narrow": (
        STORED,
        with_tensors(lambda t: t.update({f"{UP}.U": t[f"{UP}.U"][:, :5].contiguous()})),
        rf"{UP}\.U is \[48, 5\], where \[48, 32\] fits",
    ),
    "all of a layer too narrow": (
        STORED,
        with_tensors(
            lambda t: (
                t.update({f"{UP}.{k}": t[f"{UP}.{k}"][:5].contiguous() for k in ("S", "scores", "Vh")})
                or t.update({f"{UP}.U": t[f"{UP}.U"][:, :5].contiguous()})
            )
        ),
        UP,
    ),
    "scores too few": (
        ("compact",),
        with_tensors(lambda t: t.update({f"{UP}.scores": t[f"{UP}.scores"][:5].contiguous()})),
        rf"{UP}.scores' is \[5\], but must be \[32\]",
    ),
    "adapters too wide": (
        ELASTIC,
        with_tensors(lambda t: t.update({f"{UP}.lora_A": torch.zeros(3, 32)})),
        rf"{UP}.lora_A.* is \[3, 32\]",
    ),
    "a norm too long": (
        STORED,
        with_tensors(lambda t: t.update({"model.norm.weight": torch.ones(33)})),
        r"model.norm.weight is \[33\], but must be \[32\]",
    ),
    "an adapter_rank of 10**12": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(adapter_rank=10**12)),
        f"{UP}.lora_A",
    ),
    "a negative adapter_rank": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(adapter_rank=-1)),
        "adapter_rank cannot be -1",
    ),
    "a mask_scale that is text": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(mask_scale="x")),
        "mask_scale cannot be 'x'",
    ),
    "an option that does not exist": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"][UP].update(colour=3)),
        "colour cannot be 3",
    ),
    "layers are a list": (ELASTIC, with_fields(lambda top, ours: ours.update(layers=[UP])), "layers must be an object"),
    "a layer that is not there": (
        ELASTIC,
        with_fields(lambda top, ours: ours["layers"].update({"model.layers.9.mlp": {}})),
        "model.layers.9.mlp",
    ),
    "a layer forgotten": (STORED, with_fields(lambda top, ours: ours["layers"].pop(UP)), f"{UP}.weight' is missing"),
    # Materialized.
    "no low-rank factor": (
        MATERIALIZED,
        with_tensors(lambda t: t.pop(f"{UP}.P.weight")),
        f"{UP}.P.weight' is missing",
    ),
    "no embedding": (
        MATERIALIZED,
        with_tensors(lambda t: t.pop("model.embed_tokens.weight")),
        "model.embed_tokens.weight' is missing",
    ),
    "a low-rank factor too narrow": (
        MATERIALIZED,
        with_tensors(lambda t: t.update({f"{UP}.C.weight": torch.zeros(40, 3)})),
        rf"{UP}.C.weight is \[40, 3\]",
    ),
    "no pivots": (MATERIALIZED, with_tensors(lambda t: t.pop(f"{UP}.is_pivot")), f"{UP}.is_pivot' is missing"),
    "a pivot too many": (
        MATERIALIZED,
        with_tensors(lambda t: t.update({f"{UP}.is_pivot": t[f"{UP}.is_pivot"] | 7})),
        f"{UP}.is_pivot does not name",
    ),
    "pivots of another layer": (
        MATERIALIZED,
        with_tensors(lambda t: t.update({f"{UP}.is_pivot": torch.zeros(2, dtype=torch.uint8)})),
        rf"{UP}.is_pivot is torch.uint8 \[2\], but must be torch.uint8 \[6\]",
    ),
    "pivoted names no layer": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours["pivoted"].append("model.layers.9.mlp.up_proj")),
        "pivoted must be a list of names in ranks",
    ),
    "the pivots forgotten": (MATERIALIZED, with_fields(lambda top, ours: ours.pop("pivoted")), "Vh.weight' is missing"),
    "a rank of 10**12": (MATERIALIZED, with_fields(lambda top, ours: ours["ranks"].update({UP: 10**12})), UP),
    "a negative rank": (MATERIALIZED, with_fields(lambda top, ours: ours["ranks"].update({UP: -1})), f"{UP}.*got -1"),
    "a rank that is no int": (MATERIALIZED, with_fields(lambda top, ours: ours["ranks"].update({UP: 3.5})), "got 3.5"),
    "another rank": (MATERIALIZED, with_fields(lambda top, ours: ours["ranks"].update({UP: 1})), UP),
    "a rank of no layer": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours["ranks"].update({"model.layers.9.mlp.up_proj": 3})),
        "no linear layer 'model.layers.9.mlp.up_proj'",
    ),
    "a rank of the head": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours["ranks"].update({"lm_head": 3})),
        "no linear layer 'lm_head'",
    ),
    "a rank that is True": (MATERIALIZED, with_fields(lambda top, ours: ours["ranks"].update({UP: True})), "got True"),
    "pivoted holds lists": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours["pivoted"].append([UP])),
        "pivoted must be a list of names in ranks",
    ),
    "a layer is pivoted twice": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours["pivoted"].append(UP)),
        "pivoted must be a list of names in ranks",
    ),
    "size_ratio is text": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours.update(size_ratio="half")),
        "size_ratio cannot be 'half'",
    ),
    "a factor is of integers": (
        MATERIALIZED,
        with_tensors(lambda t: t.update({f"{UP}.P.weight": t[f"{UP}.P.weight"].int()})),
        f"{UP}.P.weight is I32, but must be one of BF16",
    ),
    "adapters of another model": (
        MATERIALIZED,
        lambda path: (path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/else"}'),
        "adapter_config.json: load the model from a directory without adapters",
    ),
    "ranks are a list": (
        MATERIALIZED,
        with_fields(lambda top, ours: ours.update(ranks=[3])),
        "ranks must be an object",
    ),
    "a rank forgotten": (MATERIALIZED, with_fields(lambda top, ours: ours["ranks"].pop(UP)), UP),
    # Both: a model of 2**46 bytes would be allocated, were it not compared with the file first.
    "a vocabulary of 2**40": (
        ("elastic", "materialized"),
        with_fields(lambda top, ours: top.update(vocab_size=2**40)),
        r"model.embed_tokens.weight is \[64, 32\]",
    ),
}


@pytest.mark.parametrize(("kind", "wrong"), [(kind, wrong) for wrong, case in WRONG.items() for kind in case[0]])
def test_a_wrong_file_is_an_error_that_names_it(llama, kind, wrong, tmp_path):
    _, spoil, message = WRONG[wrong]
    path = tmp_path / "model"
    shutil.copytree(llama_path(llama, kind), path)
    spoil(path)
    for size_ratio in (None,) if kind == "materialized" else (None, 0.5):
        with pytest.raises(ValueError, match=message):
            load(path, size_ratio)


def in_shards(spoil):
    """The one weight file as two, listed in an index that `spoil(weight_map)` has changed."""

    def apply(path):
        file, tensors = weight_file(path), load_file(weight_file(path))
        file.unlink()
        names, stem = sorted(tensors), file.name.removesuffix(".safetensors")
        shards = {f"{stem}-0000{part + 1}-of-00002.safetensors": names[part::2] for part in (0, 1)}
        for shard, inside in shards.items():
            save_file({name: tensors[name] for name in inside}, path / shard, {"format": "pt"})
        listed = {name: shard for shard, inside in shards.items() for name in inside}
        spoil(path, listed)
        (path / f"{file.name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": listed}))

    return apply


def repeat_a_tensor(path, listed):
    one, other = sorted(set(listed.values()))
    name = next(name for name, shard in listed.items() if shard == one)
    save_file(load_file(path / other) | {name: load_file(path / one)[name]}, path / other, {"format": "pt"})


@pytest.mark.parametrize("kind", ["elastic", "materialized"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, listed: listed.clear(), "is no index of weight files"),
        (lambda path, listed: listed.update(a=3), "is no index of weight files"),
        (lambda path, listed: listed.update(a=["x.safetensors"]), "is no index of weight files"),
        (lambda path, listed: listed.update(a=".."), "is no index of weight files"),
        (lambda path, listed: listed.update(a=""), "is no index of weight files"),
        (lambda path, listed: listed.update(a="../out.safetensors"), "is no index of weight files"),
        (lambda path, listed: listed.update(a="/etc/x.safetensors"), "is no index of weight files"),
        (lambda path, listed: listed.update(a="..\\out.safetensors"), "is no index of weight files"),
        (lambda path, listed: listed.update(a="a\0.safetensors"), "is no index of weight files"),
        (lambda path, listed: listed.update(a="pytorch_model.bin"), "is no index of weight files"),
        (lambda path, listed: listed.update(a="nowhere.safetensors"), "nowhere.safetensors is missing"),
        (lambda path, listed: listed.update(a=next(iter(listed.values()))), "tensor 'a' is missing"),
        (repeat_a_tensor, "-00002-of-00002.safetensors: tensor .* is in .*-00001-of-00002.safetensors too"),
    ],
)
def test_a_wrong_index_is_named(llama, kind, spoil, message, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(llama_path(llama, kind), path)
    shutil.copy(weight_file(path), tmp_path / "out.safetensors")  # what a way out of the directory would find
    in_shards(spoil)(path)
    with pytest.raises(ValueError, match=message):
        load(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (with_fields(lambda top, ours: ours.update(compression={"config": ["x"]})), r"compression: config is \['x'\]"),
        (with_fields(lambda top, ours: ours.update(compression={"stop_ratio": "x"})), "compression: no Compression"),
        (
            with_fields(lambda top, ours: ours.update(compression={"config": "NestedConfig", "betas": None})),
            "compression: no NestedConfig has such fields",
        ),
        (with_fields(lambda top, ours: ours.update(compression={"colour": 3})), "has no field colour"),
        (lambda path: (path / "history.jsonl").write_bytes(b"\xff\n{}\n"), "history.jsonl, line 1"),
        (lambda path: (path / "history.jsonl").write_bytes(b"[" * 100_000 + b"\n"), "history.jsonl, line 1"),
        (lambda path: (path / "history.jsonl").mkdir(), "history.jsonl cannot be read"),
    ],
)
def test_a_result_with_a_wrong_origin_is_named(llama, spoil, message, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(llama_path(llama, "elastic"), path)
    spoil(path)
    with pytest.raises(ValueError, match=message):
        CompressionResult.load(path)
    assert_close(logits(load(path, 0.5)), logits(materialize(llama, 0.5)))  # the model itself is whole


@pytest.mark.parametrize("kind", ["elastic", "materialized"])
def test_no_flipped_bit_of_a_header_is_taken_for_another_model(llama, kind, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(llama_path(llama, kind), path)
    file = weight_file(path)
    good = file.read_bytes()
    length = int.from_bytes(good[:8], "little")
    options = () if kind == "materialized" else (0.5,)
    expected, refused = logits(load(path, *options)), 0
    for position in [*range(8), *range(8, 8 + length, length // 30)]:
        file.write_bytes(good[:position] + bytes([good[position] ^ (1 << position % 7)]) + good[position + 1 :])
        try:
            model = load(path, *options)
        except ValueError:
            refused += 1
        else:  # in what means nothing, such as the metadata or the name of an unused tensor
            assert torch.equal(logits(model), expected)
    assert refused > 20


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_only_directories_are_loaded(name, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=f"{name} is not a directory"):
        load(tmp_path / name)


def test_a_bad_size_is_named(llama):
    for size_ratio in (0, 1.5, float("nan"), "0.5"):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            load(llama_path(llama, "elastic"), size_ratio)
    with pytest.raises(ValueError, match="adapters must be one of"):
        load(llama_path(llama, "elastic"), 0.5, adapters="x")
    with pytest.raises(ValueError, match="count must be one of"):
        acip_kernels.load(llama_path(llama, "elastic"), 0.5, count="x")
