"""`acip serve`: a compressed model over HTTP, asked by OpenAI's own client, and what is told when it cannot start."""

import json
import re
import signal
import socket
import subprocess
import sys

import openai
import pytest
import torch
import toys
from starlette.testclient import TestClient

import acip_kernels
from acip_kernels import cli
from acip_kernels.ops import extension
from acip_kernels.serving import server
from bench.readme import ROOT

MESSAGES = [{"role": "user", "content": "w5 w9 w17"}]
TOKENS = 12


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """An elastic checkpoint, a materialized one, and one without a tokenizer."""
    folder = tmp_path_factory.mktemp("serving")
    result = toys.toy_result(toys.llama())
    acip_kernels.save(result, folder / "elastic", tokenizer=toys.tokenizer())
    acip_kernels.save(acip_kernels.materialize(result, 0.6), folder / "small model", tokenizer=toys.tokenizer())
    acip_kernels.save(acip_kernels.materialize(result, 0.6), folder / "mute")
    return folder


class Server:
    """`acip serve` in a process of its own, as people start it."""

    def __init__(self, *arguments):
        command = [sys.executable, "-m", "acip_kernels", "serve", *map(str, arguments), "--port", "0", "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def __enter__(self):
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.about = json.loads(line)
        self.client = openai.OpenAI(base_url=self.about["url"], api_key="none", max_retries=0, timeout=60)
        return self

    def stop(self):
        """As Ctrl-C does; the exit status and what it wrote to stderr."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors

    def __exit__(self, *exception):
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def expected(model, prompt):
    """What greedy `generate` writes after `prompt`, as the words of the toy's tokenizer."""
    ids = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, prompt.shape[1] :]
    return ids.tolist()


def chat_prompt():
    ids = toys.tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)["input_ids"]
    return torch.tensor([ids])


def words(text):
    return toys.tokenizer()(text)["input_ids"]


def test_a_materialized_model_streams_what_generate_writes(directories, capsys):
    path = directories / "small model"
    fused = extension.available()
    model = acip_kernels.load(path, dtype=torch.float32, fuse=fused)
    tokens = expected(model, chat_prompt())
    assert len(tokens) == TOKENS and len(set(tokens)) > 3  # the toy does not repeat itself
    with Server(path, "--dtype", "float32") as served:
        assert served.about["fused"] == fused
        client, name = served.client, "small model"
        assert [one.id for one in client.models.list()] == [name]

        request = {"model": name, "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
        chunks = list(client.chat.completions.create(**request, stream=True))
        pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
        assert len(pieces) == TOKENS  # one by one, not all in the end
        assert words("".join(pieces)) == tokens
        assert chunks[-1].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == TOKENS

        whole = client.chat.completions.create(**request)
        assert words(whole.choices[0].message.content) == tokens
        plain = client.completions.create(model=name, prompt="w7 w8", max_tokens=TOKENS, temperature=0)
        assert words(plain.choices[0].text) == expected(model, torch.tensor([[7, 8]]))
        answer = client.responses.create(model=name, input="w5", max_output_tokens=3, temperature=0, stream=False)
        assert len(words(answer.output_text)) == 3

        with pytest.raises(openai.BadRequestError, match="pinned to 'small model'"):
            client.chat.completions.create(**request | {"model": "gpt2"})
        with pytest.raises(openai.UnprocessableEntityError, match="Unexpected fields.*wishes"):
            client.chat.completions.create(**request, extra_body={"wishes": 3})

        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "serving.md").read_text("utf-8"), re.DOTALL)
        example = example.replace("http://localhost:8000/v1", served.about["url"]).replace("smol-60", name)
        exec(example, {})
        assert len(words(capsys.readouterr().out)) > 0

        # Stopped in the middle of an answer: it has some seconds to end, and then is cut off.
        endless = {"max_tokens": 100_000, "logit_bias": {"1": -100.0, "2": -100.0}}  # neither end of a text
        stream = iter(client.chat.completions.create(**request | endless, stream=True))
        next(stream)
        code, errors = served.stop()
        assert code == 0 and "Traceback" not in errors and "Cancel 1 running task" in errors
        with socket.create_server(("127.0.0.1", int(served.about["url"].split(":")[2].split("/")[0]))):
            pass  # the port is free again


def test_a_size_of_an_elastic_checkpoint_under_a_name_of_its_own(directories):
    path = directories / "elastic"
    tokens = expected(acip_kernels.load(path, 0.5, dtype=torch.float32), chat_prompt())
    with Server(path, "-s", 0.5, "--name", "half", "--no-fuse", "--dtype", "float32") as served:
        assert served.about["model"] == "half" and not served.about["fused"]
        request = {"model": "half", "messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
        answer = served.client.chat.completions.create(**request)
        assert words(answer.choices[0].message.content) == tokens
        code, errors = served.stop()
        assert code == 0 and "Traceback" not in errors


def test_the_application_has_one_model_and_keeps_it(directories):
    model, tokenizer = acip_kernels.load(directories / "small model"), toys.tokenizer()
    calls = []

    def load():
        calls.append(1)
        return model, tokenizer

    app = server.application(load, "small")
    assert len(calls) == 2  # model and tokenizer, before the first request
    with TestClient(app) as client:
        assert client.get("/health").status_code == 200
        assert "has the model 'small' alone, not 'gpt2'" in client.post("/load_model", json={"model": "gpt2"}).text
        request = {"model": "small", "messages": MESSAGES, "max_tokens": 3, "temperature": 0}
        first = client.post("/v1/chat/completions", json=request).json()["choices"]
        assert client.post("/reset").status_code == 200  # it lets go of the model, and takes it up again
        assert client.post("/v1/chat/completions", json=request).json()["choices"] == first
        tokenizer.chat_template = None
        answer = client.post("/v1/chat/completions", json=request)
        assert answer.status_code == 400 and "chat_template is not set" in answer.json()["error"]["message"]


def mistake(monkeypatch, capsys, *arguments):
    """The one line that `acip serve` ends with."""
    monkeypatch.setattr(sys, "argv", ["acip", "serve", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    error = " ".join(capsys.readouterr().err.split())
    assert "Traceback" not in error
    return error


def test_a_port_in_use_is_told_before_a_model_is_loaded(directories, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(cli, "_load", lambda *arguments: pytest.fail("loaded"))
        error = mistake(monkeypatch, capsys, directories / "small model", "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}, take another --port" in error


def test_without_the_extra_the_command_to_install_it_is_told(directories, monkeypatch, capsys):
    monkeypatch.setattr("transformers.utils.import_utils.is_serve_available", lambda: False)
    error = mistake(monkeypatch, capsys, directories / "small model", "--port", 0)
    assert "pip install 'acip-kernels[serve]'" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere/at all",), "neither a directory nor a model that can be fetched"),
        (("{folder}",), "config.json"),
        (("{folder}/elastic",), "of every size: say which with --size-ratio"),
        (("{folder}/small model", "-s", "0.5"), "--size-ratio cuts elastic checkpoints"),
        (("{folder}/mute",), "holds no tokenizer"),
        (("{folder}/small model", "--fuse", "--device", "cuda"), "--fuse is for the CPU"),
        (("{folder}/small model", "--log-level", "loud"), "--log-level must be info, warning or error"),
        (("{folder}/small model", "--port", "70000"), "port must be 0"),
        (("{folder}/small model", "--host", "no.such.host.invalid"), "cannot listen on no.such.host.invalid"),
    ],
)
def test_what_cannot_be_served_is_one_line(directories, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = [argument.format(folder=directories) for argument in arguments]
    assert message in mistake(monkeypatch, capsys, *places, *(() if "--port" in arguments else ("--port", 0)))


def test_a_model_without_a_chat_template_is_told_of(directories, monkeypatch, capsys):
    monkeypatch.setattr(server, "serve", lambda *arguments, **options: None)
    tokenizer = toys.tokenizer()
    tokenizer.chat_template = None
    monkeypatch.setattr(cli, "_tokenizer", lambda name: tokenizer)
    monkeypatch.setattr(sys, "argv", ["acip", "serve", str(directories / "small model"), "--port", "0"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert "has no chat template: /v1/chat/completions will fail" in " ".join(capsys.readouterr().err.split())
