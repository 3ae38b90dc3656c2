"""docs/ecosystem.md: its examples run, and the commands that it names exist."""

import importlib.util
import pathlib
import re

import pytest
import toys
from torch.utils.data import Dataset
from transformers import TrainingArguments

from acip_kernels import cli, hub_kernel, load, materialize, save

TEXT = (pathlib.Path(__file__).parent.parent / "docs" / "ecosystem.md").read_text("utf-8")


class Tokens(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, number):
        ids = toys.token_ids(1, 8, seed=number)[0]
        return {"input_ids": ids, "labels": ids}


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(toys.VOCABULARY)}, unk_token="w3"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


def test_its_examples_run(tmp_path, monkeypatch):
    for name in ("peft", "accelerate", "lm_eval"):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    save(materialize(toys.toy_result(toys.llama()), 0.6), "smol-60")
    hub_kernel.write_kernel("acip-kernels")
    # The page's own arguments, on the CPU and for less time.
    less = {"max_steps": 2, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    monkeypatch.setattr("transformers.TrainingArguments", lambda *a, **options: TrainingArguments(*a, **options | less))
    names = {"batches": [{"input_ids": toys.token_ids()}], "dataset": Tokens(), "tokenizer": tokenizer()}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 7
    for code in blocks:
        if "from kernels import" in code and importlib.util.find_spec("kernels") is None:
            continue
        exec(code, names)
    before, tuned, same = (load(name) for name in ("smol-60", "smol-60-tuned", "smol-60-tuned-same-size"))
    ranks = [dict(model.config.quantization_config.ranks) for model in (before, tuned, same)]
    assert ranks[0] == ranks[2]
    assert {ranks[1][name] - ranks[0][name] for name in ranks[0] if "q_proj" in name or "v_proj" in name} == {16}
    assert load("smol-60-trained").config.quantization_config.ranks == ranks[0]
    assert names["harness"].vocab_size == toys.VOCABULARY


def test_the_commands_it_names_exist():
    commands = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    named = set(re.findall(r"\bacip (\w+)", "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL))))
    assert named == {"evaluate", "run"} <= commands
    for file in re.findall(r"`(tests/\S+?\.py)`", TEXT):
        assert (pathlib.Path(__file__).parent.parent / file).exists()
