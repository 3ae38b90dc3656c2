"""The README and the pages: numbers are those of the committed results, code runs, commands and options exist."""

import importlib.util
import pathlib
import re
import shlex
import types

import pytest
import torch
import toys
import typer

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


# ---- every block of code, and every command

PAGES = [readme.ROOT / "README.md", *sorted((readme.ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page, *languages):
    return [code for language, code in BLOCK.findall(page.read_text("utf-8")) if language in languages]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_says_its_language(page):
    """Else no test would know what to do with it."""
    text = page.read_text("utf-8")
    assert text.count("```") == 2 * len(BLOCK.findall(text))
    assert {language for language, _ in BLOCK.findall(text)} <= {"python", "sh", "console", "text"}


# What these need, servers, several processes, other people's checkpoints, tests of their own have.
ELSEWHERE = ("checkpoints.md", "ecosystem.md", "many-devices.md", "serving.md")
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_in_a_page_runs(page, tmp_path, monkeypatch):
    """As it is, with a toy model where the page has a real one; without compiling."""
    monkeypatch.chdir(tmp_path)
    toys.llama(max_position_embeddings=2048).save_pretrained("toy")
    result = toys.toy_result(toys.llama(max_position_embeddings=2048))
    result.save("smol-elastic")
    acip_kernels.save(acip_kernels.materialize(result, 0.6), "smol-60", overwrite=True)
    tokenizer = lambda text, **options: types.SimpleNamespace(input_ids=toys.token_ids(1))  # noqa: E731
    names = {"tokenizer": tokenizer, "batches": [{"input_ids": toys.token_ids()}]}
    for number, code in enumerate(blocks(page, "python")):
        code = code.replace("HuggingFaceTB/SmolLM2-135M", "toy").replace("steps=400", "steps=2, dtype='float32'")
        code = code.replace('"smol-60")', f'"smol-60-{number}")') if "acip_kernels.save" in code else code
        with torch.compiler.set_stance("force_eager"):
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)


@pytest.mark.parametrize("page", ELSEWHERE)
def test_python_in_other_pages_names_what_there_is(page):
    for code in blocks(readme.ROOT / "docs" / page, "python"):
        compile(code, page, "exec")
        for name in re.findall(r"acip_kernels\.(\w+)", code):
            assert hasattr(acip_kernels, name) or importlib.util.find_spec(f"acip_kernels.{name}"), (page, name)


def commands():
    """`(where, command line)` of all that the pages and the commands' own help name."""
    for page in PAGES:
        text = page.read_text("utf-8")
        lines = [line for code in blocks(page, "sh", "console") for line in code.replace("\\\n", " ").splitlines()]
        outside = BLOCK.sub("", text)
        lines += re.findall(r"^    ((?:acip|make|python -m) .*)$", outside, re.MULTILINE)
        lines += [re.sub(r"\s+", " ", code) for code in re.findall(r"`((?:acip|make|python -m) [^`]*)`", outside)]
        yield from ((page.name, line.removeprefix("$ ")) for line in lines)
    for name, command in typer.main.get_command(cli.app).commands.items():
        for line in re.findall(r"`(acip [^`]*)`", command.help):
            yield f"acip {name} --help", line


def options(words):
    return {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}


def test_commands_and_options_in_pages_and_help_exist():
    known = {
        name: {option for parameter in command.params for option in parameter.opts} | {"-h", "--help"}
        for name, command in typer.main.get_command(cli.app).commands.items()
    }
    makefile, seen = (readme.ROOT / "Makefile").read_text(), 0
    for where, line in commands():
        words = shlex.split(line, comments=True)
        if not words or words[0] not in ("acip", "make", "python"):
            continue
        seen += 1
        if words[0] == "acip":
            assert words[1] in known or words[1].startswith("-"), (where, line)
            if words[1] == "run":  # what follows the program is the program's
                words = words[:3]
            assert options(words[2:]) <= known.get(words[1], set()), (where, line)
        elif words[0] == "make":
            target, *settings = words[1:]
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), (where, line)
            for setting in settings:
                name, _, value = setting.partition("=")
                assert f"$({name})" in makefile, (where, line)
                if name == "ARGS" and target == "demo":
                    assert options(shlex.split(value)) <= known["demo"], (where, line)
        elif words[1] == "-m":
            found = importlib.util.find_spec(words[2])
            assert found is not None, (where, line)
            text = pathlib.Path(found.origin).read_text("utf-8")
            assert all(f'"{option}"' in text for option in options(words[3:])), (where, line)
    assert seen > 20
