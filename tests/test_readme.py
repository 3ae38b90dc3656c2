"""The README: its numbers are those of the committed result, its quickstart runs, its names exist."""

import pathlib
import re

import toys

import acip_kernels
from acip_kernels import cli, files
from bench import readme

TEXT = (readme.ROOT / "README.md").read_text("utf-8")


def test_its_numbers_are_those_of_the_committed_result():
    assert readme.with_block(TEXT, readme.block(files.read_json(readme.RESULT))) == TEXT


def test_the_training_pages_numbers_are_those_of_the_committed_results():
    text = readme.TRAINING.read_text("utf-8")
    assert readme.with_block(text, readme.training_block()) == text


def test_the_quality_pages_numbers_are_those_of_the_committed_results():
    text = readme.QUALITY.read_text("utf-8")
    assert readme.with_block(text, readme.quality_block()) == text


def test_the_decoding_pages_numbers_are_those_of_the_committed_results():
    text = readme.DECODING.read_text("utf-8")
    assert readme.with_block(text, readme.decoding_block()) == text


def test_the_gpu_pages_numbers_are_those_of_the_committed_results():
    text = readme.GPU.read_text("utf-8")
    assert readme.with_block(text, readme.gpu_block()) == text


def test_the_page_on_many_devices_has_what_its_functions_compute():
    text = readme.MANY_DEVICES.read_text("utf-8")
    assert readme.with_block(text, readme.many_devices.block()) == text


def test_its_result_shows_what_the_demo_must():
    summary = files.read_json(readme.RESULT)
    rows = {(row["method"], row["size_ratio"]): row for row in summary["rows"]}
    dense = rows["dense", 1.0]
    assert abs(dense["perplexity"] - 16.75) < 0.1
    for size, most in ((1.0, 1.05), (0.8, 1.3), (0.6, 2.5), (0.4, 6.0)):
        row = rows["nested", size]
        assert row["perplexity"] < most * dense["perplexity"] and row["factorized"] <= size
        assert row["decode_tokens_per_s"] > dense["decode_tokens_per_s"]
    assert summary["seconds"] < 12 * 60
    assert summary["peak_memory_bytes"] < 6e9


def test_its_quickstart_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(code.strip().splitlines()) < 10
    monkeypatch.chdir(tmp_path)
    toys.llama().save_pretrained("toy")
    code = code.replace("HuggingFaceTB/SmolLM2-135M", "toy").replace("steps=400", "steps=3, dtype='float32'")
    names = {"batches": [{"input_ids": toys.token_ids()}]}
    exec(code, names)
    loaded = acip_kernels.load("smol-60")
    assert loaded.config.quantization_config.factorized <= 0.6
    assert pathlib.Path("runs/smol/history.jsonl").exists()


def test_the_commands_it_names_exist():
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    for name in re.findall(r"`acip (\w+)`", TEXT):
        assert name in commands
    targets = re.findall(r"^(\w+):", (readme.ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
