"""`bench.generate --device cuda` without a GPU: its loops decode as `generate` does, what fails is written down."""

import pytest
import torch

from acip_kernels.ops import extension
from acip_kernels.ops.fused_linear import measured
from bench import generate

LOOPS = generate.GENERATE, generate.STATIC, generate.GRAPH

TINY = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 100, "max_position_embeddings": 128,
    "dtype": torch.float32,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    found = generate.llama(**TINY)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return found


def test_the_captured_loop_decodes_what_generate_does(model):
    model.eval()
    model.generation_config.eos_token_id = None
    loop = generate.GraphLoop(model, 30)
    for seed in (0, 1):  # the cache is begun anew
        prompt = torch.randint(3, 100, (1, 7), generator=torch.Generator().manual_seed(seed))
        expected = model.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert torch.equal(loop(prompt, 12), expected) and expected.shape == (1, 19)


def test_a_rehearsal_and_a_case_that_fails(model, monkeypatch):
    original = generate.GraphLoop.__call__

    def breaks(self, prompt, tokens):
        if generate.is_fused(self.model):
            raise RuntimeError("cannot be captured")
        return original(self, prompt, tokens)

    monkeypatch.setattr(generate.GraphLoop, "__call__", breaks)
    said = []
    found = generate.bench_gpu(model, "tiny", (0.5,), LOOPS, 4, 1, None, said.append)
    rows = {(row["variant"], row["loop"]): row for row in found["rows"]}
    for variant in (generate.DENSE, generate.TWO, generate.OURS):
        assert {loop for name, loop in rows if name == variant} == set(LOOPS)
    assert rows[generate.OURS, generate.GRAPH]["times_dense"] > 0
    if extension.available():
        failed = {error["variant"]: error for error in found["errors"]}
        assert failed[generate.FUSED]["error"] == "RuntimeError: cannot be captured"
        assert (generate.FUSED, generate.STATIC) in rows
    assert "CUDA graph" in generate.table(found["rows"])


def test_kernels_are_taken_everywhere_until_tuned():
    gpu = torch.device("cuda", 0)
    held = measured.table
    with generate.kernels_everywhere():
        assert measured.token_counts(gpu, False) == (1, 16) and measured.is_faster(gpu, (1, 0, (), (), 2), True)
        assert measured.table(torch.device("cpu")) is None
    assert measured.table is held


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_it_says_so():
    import typer.testing

    app = typer.Typer()
    app.command()(generate.main)
    result = typer.testing.CliRunner().invoke(app, ["--device", "cuda"])
    assert result.exit_code != 0 and "there is no GPU" in result.output


def test_a_loop_of_another_device_is_refused():
    import typer.testing

    app = typer.Typer()
    app.command()(generate.main)
    done = typer.testing.CliRunner().invoke(app, ["--loop", generate.GRAPH, "--no-store"])
    assert done.exit_code == 2 and "loop must be one of generate, compiled loop on cpu" in " ".join(done.output.split())
