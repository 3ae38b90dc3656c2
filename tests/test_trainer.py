"""`transformers.Trainer` on materialized models, as on any other model."""

import pytest
import torch
import toys
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from acip_kernels import LowRankLinear, PivotLinear, load, materialize, save

pytest.importorskip("accelerate")

DATA = [{"input_ids": ids, "labels": ids} for ids in toys.token_ids(8, 16)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("trainer") / "model"
    save(materialize(toys.toy_result(toys.llama()), 0.6), path)
    return path


def trainer(model, folder, steps=24, **options):
    settings = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "logging_steps": 1, "seed": 0}
    settings |= {"max_steps": steps, "save_strategy": "no", "lr_scheduler_type": "constant"}
    settings |= {"use_cpu": True, "report_to": [], "disable_tqdm": True}
    return Trainer(model, TrainingArguments(output_dir=str(folder), **settings | options), train_dataset=DATA)


def losses(trained):
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"bf16": True}, {"bf16": True, "gradient_checkpointing": True}],
    ids=lambda options: "+".join(options) or "plain",
)
def test_it_fine_tunes_and_the_result_loads_again(directory, tmp_path, options):
    model = AutoModelForCausalLM.from_pretrained(directory)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear | PivotLinear)]
    before = [parameter.detach().clone() for layer in layers for parameter in layer.parameters()]
    done = trainer(model, tmp_path, **options)
    done.train()
    history = losses(done)
    assert len(history) == 24 and sum(history[-4:]) < 0.8 * sum(history[:4])
    after = [parameter for layer in layers for parameter in layer.parameters()]
    assert layers and not any(torch.equal(*pair) for pair in zip(before, after, strict=True) if pair[0].numel())
    done.save_model(tmp_path / "tuned")
    trained = model.state_dict()  # not the outputs: Trainer leaves the model under its autocast
    for loaded in (load(tmp_path / "tuned"), AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")):
        state = loaded.state_dict()
        assert state.keys() == trained.keys() and all(torch.equal(state[name], trained[name]) for name in state)


def test_gradient_checkpointing_is_the_same_training(directory, tmp_path):
    histories = []
    for number, checkpointing in enumerate((False, True)):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)
        done = trainer(model, tmp_path / str(number), 4, gradient_checkpointing=checkpointing)
        done.train()
        histories.append(losses(done))
    assert histories[0] == pytest.approx(histories[1], rel=1e-9)


def test_an_interrupted_training_goes_on(directory, tmp_path):
    whole = trainer(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "whole", 8)
    whole.train()
    options = {"save_strategy": "steps", "save_steps": 4}
    trainer(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "parts", 4, **options).train()
    again = trainer(AutoModelForCausalLM.from_pretrained(directory), tmp_path / "parts", 8, **options)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_adapters_on_a_model_that_checkpoints_gradients(tmp_path, quantize):
    peft = pytest.importorskip("peft")
    made = materialize(toys.toy_result(toys.llama()), 0.6, quantize=quantize)
    save(made, tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], task_type="CAUSAL_LM")
    done = trainer(peft.get_peft_model(base, config), tmp_path, learning_rate=3e-2, gradient_checkpointing=True)
    done.train()
    history = losses(done)
    assert sum(history[-4:]) < 0.9 * sum(history[:4])
    done.save_model(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    assert torch.equal(toys.logits(again), toys.logits(done.model.eval()))
