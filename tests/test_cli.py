"""The command line: every command on a toy model, its JSON, its help, its mistakes."""

import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest
import torch
import toys
from published import Published
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import acip_kernels
from acip_kernels import cli, launch
from acip_kernels.compress import CompressionConfig, NestedConfig

BATCHES = ("--batch-size", 2, "--length", 16)
COMMANDS = (
    "compress",
    "materialize",
    "finetune",
    "import",
    "export",
    "evaluate",
    "serve",
    "tune",
    "run",
    "info",
    "verify",
    "plot",
    "demo",
)


def acip(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def as_json(*arguments):
    return json.loads(acip(*arguments, "--json"))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy model with its tokenizer, a text, and a finished run."""
    folder = tmp_path_factory.mktemp("cli")
    toys.llama(max_position_embeddings=128).save_pretrained(folder / "toy")
    toys.tokenizer().save_pretrained(folder / "toy")
    (folder / "text.txt").write_text(toys.text())
    options = ("--recipe", "paper", "--steps", 6, "--stop-ratio", 0.5, "--adapter-rank", 2, *BATCHES)
    summary = as_json("compress", folder / "toy", "-d", folder / "text.txt", "-o", folder / "run", *options)
    return folder, summary


def test_compress_writes_elastic_history_and_plots(base):
    folder, summary = base
    assert summary["size_ratio"] <= 0.5
    assert summary["steps"] == len((folder / "run" / "history.jsonl").read_text().splitlines())
    for path in [summary["elastic"], *summary["plots"]]:
        assert (folder / path).exists()
    # Resuming what is finished changes nothing.
    options = ("--recipe", "paper", "--steps", 6, "--stop-ratio", 0.5, "--adapter-rank", 2, *BATCHES, "--resume")
    again = as_json("compress", folder / "toy", "-d", folder / "text.txt", "-o", folder / "run", *options)
    assert again == summary


def test_materialize_evaluate_info_and_plot(base, tmp_path):
    folder, summary = base
    made = as_json("materialize", summary["elastic"], "-s", 0.6, "-o", tmp_path / "small")
    assert made["factorized"] <= 0.6 and made["size_ratio"] == 0.6
    assert "# toy, compressed with ACIP" in (tmp_path / "small" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert made["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())

    result = as_json(
        *("evaluate", folder / "toy", summary["elastic"], tmp_path / "small", "-s", 1.0, "-s", 0.6),
        *("-d", folder / "text.txt", "--context", 32, "--max-windows", 4, "--new-tokens", 3, "--prefill-tokens", 16),
        *("--rounds", 1, "--prompt", "w3 w4", "-o", tmp_path / "evaluation.json"),
    )
    rows = {row["method"]: row for row in result["rows"]}
    assert list(rows) == ["toy", "run 1", "run 0.6", "small"]
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert rows["run 0.6"]["perplexity"] == pytest.approx(rows["small"]["perplexity"], rel=1e-5)
    assert rows["small"]["flops_per_token"] < rows["toy"]["flops_per_token"]
    assert rows["small"]["file_bytes"] < rows["toy"]["file_bytes"]
    assert all(row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0 for row in rows.values())
    assert all(len(row["samples"]) == 1 for row in rows.values())
    assert result["peak_memory_bytes"] > 0
    assert result["perplexity_on"] == {"data": str(folder / "text.txt"), "context": 32, "stride": 32}

    about = as_json("info", summary["elastic"])
    assert about["kind"] == "elastic"
    assert about["sizes"]["0.6"]["factorized"] <= 0.6
    assert as_json("info", tmp_path / "small")["ranks"]
    assert as_json("info", folder / "toy")["kind"] == "dense"
    assert "reference" in as_json("info")["backends"]["lowrank_linear"]
    assert "elastic" in acip("info", summary["elastic"])

    for source in (folder / "run", tmp_path / "small", tmp_path / "evaluation.json"):
        plots = as_json("plot", source, "-o", tmp_path / "plots")["plots"]
        assert plots and all((tmp_path / path).stat().st_size > 1000 for path in plots)


def test_materialize_quantizes(base, tmp_path):
    folder, summary = base
    calibration = ("-d", folder / "text.txt", "--calibration-batches", 4, "--length", 32)
    # Of layers this narrow in int4, the pivoted form alone is smaller than the dense one.
    quantized = ("--quantize", "int4", "--quantize-group", 32, "--forms", "pivoted")
    perplexities = []
    for name, options in (("near", ()), ("by-text", calibration)):
        arguments = ("-s", 0.8, "-o", tmp_path / name, *quantized, *options)
        made = as_json("materialize", summary["elastic"], *arguments)
        about = as_json("info", tmp_path / name)
        stored = about["quantized"]
        assert {key: stored[key] for key in ("bits", "group")} == {"bits": 4, "group": 32}
        assert stored["dense_layers"] + about["low_rank_layers"] == 14
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert made["parameters"] == sum(tensor.numel() for tensor in model.state_dict().values())
        assert made["factorized"] <= 0.8 and made["file_bytes"] == about["file_bytes"]
        as_json("plot", tmp_path / name)
        options = ("--no-speed", "-d", folder / "text.txt", "--context", 32, "--max-windows", 8)
        perplexities.append(as_json("evaluate", tmp_path / name, *options)["rows"][0]["perplexity"])
    assert perplexities[0] != perplexities[1]
    as_json("materialize", summary["elastic"], "-s", 0.8, "-o", tmp_path / "8", "--quantize", "int8")
    assert as_json("info", tmp_path / "8")["quantized"]["bits"] == 8
    assert "bits: 4" in acip("info", tmp_path / "near")


def test_import_of_a_published_checkpoint(base, tmp_path):
    folder, _ = base
    dense = AutoModelForCausalLM.from_pretrained(folder / "toy")
    path = Published(dense, adapters={"default": {}}).write(tmp_path / "published")
    about = as_json("info", path)
    assert about["kind"] == "published ACIP checkpoint" and about["base_model"] == "toy"
    assert "acip import" in about["to_use_it"]
    made = as_json("import", path, "--base", folder / "toy", "-o", tmp_path / "elastic")
    assert made["kind"] == "elastic" and made["layers"] == 14
    assert as_json("info", tmp_path / "elastic")["kind"] == "elastic"
    options = ("-s", 0.6, "--count", "paper")
    first = as_json("materialize", tmp_path / "elastic", *options, "-o", tmp_path / "first")
    second = as_json("materialize", path, "--base-model", folder / "toy", *options, "-o", tmp_path / "second")
    assert first | {"model": ""} == second | {"model": ""}
    assert as_json("info", tmp_path / "first")["ranks"] == as_json("info", tmp_path / "second")["ranks"]
    # One that says where its base model is needs no more for its size, its tokenizer included.
    published = Published(dense)
    kwargs = published.config["base_model_config"]["pretrained_model_kwargs"]
    kwargs["pretrained_model_name_or_path"] = str(folder / "toy")
    named = published.write(tmp_path / "named")
    options = ("-s", 0.6, "-d", folder / "text.txt", "--context", 16, "--max-windows", 2, "--no-speed")
    (row,) = as_json("evaluate", named, *options)["rows"]
    assert row["factorized"] <= 0.6
    as_json("materialize", named, "-s", 0.6, "-o", tmp_path / "third")
    assert list((tmp_path / "third").glob("tokenizer*"))
    with pytest.raises(ValueError, match="is a published ACIP checkpoint: `acip import` it"):
        acip("finetune", named, "-s", 0.6, "-o", tmp_path / "none")
    with pytest.raises(ValueError, match="whose names are known: leave --names out"):
        acip("import", path, "--base", folder / "toy", "--names", "asvd", "-o", tmp_path / "none")


def test_import_of_factors_and_export(base, tmp_path):
    folder, _ = base
    dense = AutoModelForCausalLM.from_pretrained(folder / "toy")
    state = dict(dense.state_dict())
    for name in [name for name in state if name.endswith("up_proj.weight")]:
        U, S, Vh = torch.linalg.svd(state.pop(name), full_matrices=False)
        state[name.replace("up_proj.weight", "up.left")] = (U * S)[:, :9].contiguous()
        state[name.replace("up_proj.weight", "up.right")] = Vh[:9].contiguous()
    save_file(state, tmp_path / "factors.safetensors")
    source = (tmp_path / "factors.safetensors", "--base", folder / "toy", "-o", tmp_path / "imported")
    with pytest.raises(ValueError, match="acip import … --names"):
        acip("import", *source)
    made = as_json("import", *source, "--names", "U=*.left,Vh=*.right,layer=*_proj")
    assert made["kind"] == "materialized"
    assert set(as_json("info", tmp_path / "imported")["ranks"].values()) == {9}

    sizes = {}
    for form in ("dense", "factors", "onnx"):
        sizes[form] = as_json("export", tmp_path / "imported", "--form", form, "-o", tmp_path / form)["file_bytes"]
    assert sizes["factors"] < sizes["dense"]
    assert as_json("info", tmp_path / "factors")["kind"].startswith("plain nn.Linear pairs")
    imported, dense = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("imported", "dense"))
    toys.assert_close(toys.logits(dense), toys.logits(imported))
    for wrong, message in (("gguf", "--form must be one of dense, factors, onnx"), ("dense", "not empty")):
        with pytest.raises((ValueError, FileExistsError), match=message):
            acip("export", tmp_path / "imported", "--form", wrong, "-o", tmp_path / "dense")


@pytest.mark.parametrize("adapters", ["merge", "truncate"])
def test_finetune_trains_and_merges(base, tmp_path, adapters, monkeypatch):
    folder, summary = base
    elastic = folder / summary["elastic"]
    small = as_json("materialize", elastic, "-s", 0.5, "-o", tmp_path / "small", "--adapters", "drop")
    options = ("--steps", 12, "--learning-rate", 1e-2, "--adapter-rank", 2, "--adapters", adapters, *BATCHES)
    tuned = as_json("finetune", tmp_path / "small", "-d", folder / "text.txt", "-o", tmp_path / "tuned", *options)
    assert tuned["last_loss"] < tuned["first_loss"]
    assert (tuned["file_bytes"] > small["file_bytes"]) == (adapters == "merge")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model(toys.token_ids()).logits.isfinite().all()
    loads, load = [], acip_kernels.load
    monkeypatch.setattr(acip_kernels, "load", lambda *arguments, **named: loads.append(1) or load(*arguments, **named))
    as_json("finetune", elastic, "-s", 0.6, "-d", folder / "text.txt", "-o", tmp_path / "cut", *options)
    assert len(loads) == 1
    for model in ((elastic, "-s", 0.6), (tmp_path / "small",)):
        with pytest.raises(ValueError, match="--distillation would do nothing: adapters are trained"):
            acip("finetune", *model, "-o", tmp_path / "none", "--distillation", 0.5)
    with pytest.raises(ValueError, match="say which with --size-ratio"):
        acip("finetune", elastic, "-d", folder / "text.txt", "-o", tmp_path / "none", *options)


def test_compressing_quantized_layers_is_refused_before_the_work(base, tmp_path):
    folder, summary = base
    as_json("materialize", folder / summary["elastic"], "-s", 0.5, "--quantize", "int8", "-o", tmp_path / "small")
    with pytest.raises(ValueError, match="has quantized layers, as .*: compress the model that it was made from"):
        acip("compress", tmp_path / "small", "-d", folder / "text.txt", "-o", tmp_path / "run", *BATCHES)


def test_finetune_trains_the_scales_of_a_quantized_model(base, tmp_path):
    folder, summary = base
    elastic, data = folder / summary["elastic"], ("-d", folder / "text.txt", *BATCHES)
    as_json("materialize", elastic, "-s", 0.5, "--quantize", "int4", "-o", tmp_path / "int4")
    for teacher in (elastic, folder / "toy"):
        options = ("--teacher", teacher, "--steps", 12, "--learning-rate", 1e-2)
        tuned = as_json("finetune", tmp_path / "int4", "-o", tmp_path / "tuned", "--overwrite", *options, *data)
        assert tuned["last_loss"] < tuned["first_loss"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("int4", "tuned"))
    assert {name: t.dtype for name, t in before.items()} == {name: t.dtype for name, t in after.items()}
    assert before["model.norm.weight"].dtype == torch.float32
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed and all(name.endswith("scales") for name in changed)
    for idle, why in (
        (("--adapter-rank", 4, "--adapters", "merge"), "--adapters, --adapter-rank would do nothing: the scales"),
        (("--distillation", 0.3), "--distillation would do nothing: .* without --teacher by the text alone"),
    ):
        with pytest.raises(ValueError, match=why):
            acip("finetune", tmp_path / "int4", "-o", tmp_path / "none", *idle, *data)
    with pytest.raises(ValueError, match="--teacher would do nothing: adapters are trained"):
        acip("finetune", elastic, "-s", 0.6, "-o", tmp_path / "none", "--teacher", elastic, *data)


def test_finetune_trains_the_factors_of_a_checkpoint_without_adapters(base, tmp_path):
    folder, _ = base
    data = ("-d", folder / "text.txt", *BATCHES)
    options = ("--method", "importance", "--calibration-batches", 2)
    elastic = folder / as_json("compress", folder / "toy", "-o", tmp_path / "run", *options, *data)["elastic"]
    small = as_json("materialize", elastic, "-s", 0.5, "-o", tmp_path / "small")
    fitting = ("--recalibrate", "-d", folder / "text.txt", "--calibration-batches", 2, "--length", 16)
    fitted = as_json("materialize", elastic, "-s", 0.5, "-o", tmp_path / "fitted", *fitting)
    assert fitted["parameters"] == small["parameters"]
    as_json("materialize", elastic, "-s", 0.5, "-o", tmp_path / "fitted-4", *fitting, "--quantize", "int4")
    with pytest.raises(ValueError, match="--recalibrate fits on a text"):
        acip("materialize", elastic, "-s", 0.5, "-o", tmp_path / "none", "--recalibrate")
    options = ("--steps", 12, "--learning-rate", 1e-2, "--adapter-rank", 4)
    tuned = as_json("finetune", elastic, "-s", 0.5, "-o", tmp_path / "tuned", *options, *data)
    first, last = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("small", "tuned"))
    refitted = AutoModelForCausalLM.from_pretrained(tmp_path / "fitted")
    made = [model(toys.token_ids()).logits for model in (first, last, refitted)]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert tuned["parameters"] == small["parameters"] and tuned["file_bytes"] == small["file_bytes"]
    with pytest.raises(ValueError, match="say which with --size-ratio"):
        acip("finetune", elastic, "-o", tmp_path / "none", *data)
    idle = ("--adapter-alpha", 8, "--adapter-dropout", 0.0, "--adapters", "truncate")
    message = "--adapter-alpha, --adapter-dropout, --adapters would do nothing: the factors of this checkpoint are"
    with pytest.raises(ValueError, match=message):
        acip("finetune", elastic, "-s", 0.5, "-o", tmp_path / "none", *idle, *data)


def test_files_keep_the_dtype_of_the_model_whatever_is_computed_with(base, tmp_path):
    folder, _ = base
    AutoModelForCausalLM.from_pretrained(folder / "toy", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    for file in (folder / "toy").glob("tokenizer*"):
        (tmp_path / "half" / file.name).write_bytes(file.read_bytes())
    options = ("--steps", 1, "--length", 16, "--batch-size", 1, "--dtype", "float32")
    summary = as_json("compress", tmp_path / "half", "-d", folder / "text.txt", "-o", tmp_path / "run", *options)
    as_json("materialize", summary["elastic"], "-s", 0.5, "-o", tmp_path / "small")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}


def test_the_table_is_for_people(base):
    folder, _ = base
    result = CliRunner().invoke(cli.app, ["evaluate", str(folder / "toy"), "--no-speed", "--prompt", "w3"])
    assert result.exit_code == 0
    assert result.stdout == ""  # stdout is for machines
    assert "toy" in result.stderr and "peak memory" in result.stderr


def write_task(folder, name):
    """A task of LM-Eval's that is all here: which of two words follows."""
    examples = [{"text": f"w{i} w{i + 1}", "choices": [f"w{i + 2}", f"w{i + 3}"], "label": i % 2} for i in range(3, 9)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(folder / f"{name}.jsonl")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def test_tasks_by_evaluate_and_by_lm_eval_itself(base, tmp_path, monkeypatch):
    """`evaluate --tasks` in one command; and LM-Eval's own, which finds the format because `run` imports us."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    _, summary = base
    as_json("materialize", summary["elastic"], "-s", 0.5, "-o", tmp_path / "small")
    for name in ("one", "two"):
        write_task(tmp_path, name)
    options = ("--tasks", "one,two", "--include-path", tmp_path)
    # In one dtype: of a toy's two words, bfloat16 may find the other one likelier.
    result = as_json("evaluate", tmp_path / "small", "--no-speed", "--dtype", "float32", *options, "--limit", 4)
    ours = result["rows"][0]["tasks"]
    assert set(ours) == {"one", "two"} and 0 <= ours["one"]["acc"] <= 1

    arguments = ("--model", "hf", "--model_args", f"pretrained={tmp_path / 'small'},dtype=float32", "--device", "cpu")
    arguments += ("--tasks", "one,two", "--include_path", tmp_path, "--limit", "4", "--output_path", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["acip"])  # put back afterwards
    monkeypatch.setattr(sys, "path", list(sys.path))
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    outcome = CliRunner().invoke(cli.app, ["run", "lm_eval", *map(str, arguments)])
    assert outcome.exit_code == 0, outcome.output
    (file,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(file.read_text())["results"]
    assert {name: theirs[name]["acc,none"] for name in ours} == {name: ours[name]["acc"] for name in ours}


def test_run_is_python_with_the_import(tmp_path, monkeypatch, capsys):
    program = (
        "import sys, helper\nprint('acip_kernels' in sys.modules, sys.argv[1:], __name__)\nsys.exit(helper.STATUS)"
    )
    (tmp_path / "program.py").write_text(program)
    (tmp_path / "helper.py").write_text("STATUS = 3")
    expected = "True ['--help', '-x', '--json', 'y'] __main__\n"
    done = subprocess.run(
        [sys.executable, "-m", "acip_kernels", "run", "program.py", "--help", "-x", "--json", "y"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(pathlib.Path(cli.__file__).parent.parent)},
    )
    assert (done.returncode, done.stdout) == (3, expected), done.stderr
    # And as a module, in this process.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["acip"])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(SystemExit) as stop:
        launch.run_program("program", ["--help", "-x", "--json", "y"])
    assert stop.value.code == 3 and capsys.readouterr().out == expected
    # An error of the program's is shown as Python shows it.
    (tmp_path / "helper.py").write_text("raise ValueError('its own')")
    sys.modules.pop("helper")
    with pytest.raises(SystemExit) as stop:
        launch.run_program("program.py", [])
    assert stop.value.code == 1 and 'helper.py", line 1' in capsys.readouterr().err


def test_help_of_every_command_shows_an_example():
    assert all(command in acip("--help") for command in COMMANDS)
    for command in COMMANDS:
        assert f"acip {command}" in acip(command, "--help").replace("\n", " "), command


def test_compress_has_every_field_of_the_configuration():
    import dataclasses

    fields = {field.name for kind in (CompressionConfig, NestedConfig) for field in dataclasses.fields(kind)}
    assert {*cli._CONFIG_HELP, "steps", "method"} == fields
    shown = CliRunner().invoke(cli.app, ["compress", "--help"], env={"COLUMNS": "200"}).stdout
    for name in cli._CONFIG_HELP:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("materialize", "nowhere", "-s", "0.5", "-o", "x"), "nowhere is not a directory"),
        (("materialize", "{elastic}", "-s", "1.5", "-o", "x"), "size_ratio is what is left, in (0, 1]"),
        (("materialize", "{toy}", "-s", "0.5", "-o", "x"), "is not an elastic checkpoint"),
        (
            ("materialize", "{elastic}", "-s", "0.5", "-o", "x", "--quantize", "int3"),
            "one of int8, int4, fp8, got 'int3'",
        ),
        (("materialize", "{elastic}", "-s", "0.5", "-o", "x", "-d", "{text}"), "--data is for --quantize"),
        (("run", "nowhere"), "nowhere is no Python file, no command of an installed Python package, and no module"),
        (("run", "nowhere.py"), "nowhere.py is no file"),
        (("info", "nowhere"), "nowhere is not a directory"),
        (("plot", "nowhere"), "nowhere does not exist"),
        (("plot", "{toy}"), "holds nothing to plot"),
        (("evaluate", "{toy}", "-s", "0.5"), "none of the models is one"),
        (("compress", "{toy}", "-o", "{run}", "-d", "nowhere.txt", "--steps", "3"), "nowhere.txt"),
        (("compress", "{toy}", "-o", "{run}", "-d", "{text}", "--steps", "3", "--length", "16"), "resume it, or give"),
        (("compress", "{toy}", "-o", "x", "-d", "{text}", "--recipe", "paper", "--stop-ratio", "3"), "stop_ratio"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(base, tmp_path, monkeypatch, capsys, arguments, message):
    folder, summary = base
    places = {"elastic": summary["elastic"], "toy": folder / "toy", "run": folder / "run", "text": folder / "text.txt"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["acip", *(argument.format(**places) for argument in arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert "Traceback" not in error


def test_the_command_is_installed():
    result = subprocess.run(
        [sys.executable, "-m", "acip_kernels", "--help"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0
    assert "materialize" in result.stdout


def test_demo_runs_on_any_model_and_text(base, tmp_path):
    folder, _ = base
    arguments = (
        "demo",
        "--model",
        folder / "toy",
        "--data",
        folder / "text.txt",
        "-o",
        tmp_path / "demo",
        "--steps",
        4,
    )
    summary = as_json(*arguments)
    rows = summary["rows"]
    assert [(row["method"], row["size_ratio"]) for row in rows] == [
        ("dense", 1.0),
        *(("nested", size) for size in (1.0, 0.8, 0.6, 0.4)),
    ]
    for row in rows:
        assert row["factorized"] <= row["size_ratio"]
        assert row["perplexity"] > 1 and row["parameters"] > 0 and row["file_bytes"] > 0
        assert row["decode_tokens_per_s"] > 0 and row["prefill_tokens_per_s"] > 0
    for size in ("1", "0.8", "0.6", "0.4"):
        directory = tmp_path / "demo" / f"size-{size}"
        assert (directory / "model.safetensors").exists() and (directory / "README.md").exists()
    assert {path.name for path in (tmp_path / "demo" / "plots").iterdir()} == {
        f"{name}.{kind}"
        for name in ("perplexity", "history", "ranks-0.8", "ranks-0.6", "ranks-0.4")
        for kind in ("png", "svg")
    }
    assert json.loads((tmp_path / "demo" / "summary.json").read_text()) == summary
    # Interrupted and started again, it goes on with the same run.
    again = as_json(*arguments)
    assert [row["perplexity"] for row in again["rows"]] == [row["perplexity"] for row in rows]


@pytest.mark.parametrize("method", cli.METHODS)
def test_every_method_by_name(base, method, tmp_path):
    folder, _ = base
    steps = ("--steps", 3) if method in ("nested", "acip") else ()
    options = ("--method", method, *steps, "--calibration-batches", 2, "--dtype", "float32", *BATCHES)
    summary = as_json("compress", folder / "toy", "-d", folder / "text.txt", "-o", tmp_path / "run", *options)
    assert summary["steps"] == {"nested": 3, "acip": 3}.get(method, 0) or method == "acip"
    assert (summary["history"] is None) == (not steps)
    about = as_json("materialize", summary["elastic"], "-s", 0.5, "-o", tmp_path / "half")
    assert 0.4 < about["factorized"] <= 0.5
    plain = as_json("materialize", summary["elastic"], "-s", 0.5, "-o", tmp_path / "two", "--forms", "factors")
    assert 0.4 < plain["factorized"] <= 0.5
    assert as_json("info", tmp_path / "half")["kind"] == "materialized"
    assert as_json("plot", tmp_path / "half")["plots"] and as_json("plot", tmp_path / "run")["plots"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "guess"), "--method must be one of"),
        (("--recipe", "old"), "--recipe must be best or paper"),
        (("--recipe", "paper", "--method", "svd"), "--recipe paper is --method acip"),
        (("--lambda-start", 0.1), "--method nested has no --lambda-start"),
        (("--method", "svd", "--steps", 3), "trains nothing"),
        (("--compact",), "--compact keeps scores and adapters alone"),
        (("--method", "asvd", "--allocation", "loss"), "allocation of asvd must be one of"),
    ],
)
def test_options_that_do_not_fit_the_method(base, options, message, tmp_path):
    folder, _ = base
    with pytest.raises(ValueError, match=message):
        acip("compress", folder / "toy", "-d", folder / "text.txt", "-o", tmp_path / "run", *options)
