"""The same model compiled, in bfloat16, and on the kernels."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small import build, gradients, mlm_labels, packed, padded

from minibert.batch import IGNORE
from minibert.model import BertForPreTraining, BertModel
from minibert.train.optim import adamw

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device here")


def labelled(lengths=(7, 1, 5)):
    inputs = padded(lengths)
    labels = mlm_labels(inputs)[inputs["attention_mask"].bool()]
    rows = (labels != IGNORE).nonzero().squeeze(1)
    nsp = torch.arange(len(lengths)) % 2
    return dataclasses.replace(packed(inputs), mlm_rows=rows, mlm_labels=labels[rows], nsp_labels=nsp)


@pytest.mark.parametrize("train", [False, True])
def test_a_packed_model_compiles_into_one_graph(train):
    torch._dynamo.reset()
    eager, compiled = (build(BertForPreTraining, train=train, num_hidden_layers=1) for _ in range(2))
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    seed = torch.tensor(7)
    a, b = run(labelled(), seed=seed).loss, eager(labelled(), seed=seed).loss
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    a.backward()
    b.backward()
    a, b = gradients(compiled), gradients(eager)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_new_lengths_soon_need_no_new_graph():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    run = torch.compile(build(BertForPreTraining, num_hidden_layers=1), fullgraph=True, backend=counter)
    for lengths in ((7, 1, 5), (6, 2), (4, 3, 3, 3)):
        run(labelled(lengths))
    graphs = counter.frame_count
    for lengths in ((6, 5), (5, 4, 2, 6, 1), (2, 6, 5, 1), (3, 4, 6)):
        run(labelled(lengths))
    assert counter.frame_count <= graphs + 1 <= 5


@pytest.mark.parametrize("train", [False, True])
def test_bfloat16_autocast_is_finite_and_close(train):
    model, batch = build(BertForPreTraining, train=train, initializer_range=0.1), labelled()
    plain = model(batch, seed=7, output_hidden_states=True)
    plain.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch, seed=7, output_hidden_states=True)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(state.dtype == torch.bfloat16 for state in output.hidden_states)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.02, atol=0.02)
    for a, b in zip(output.hidden_states, plain.hidden_states, strict=True):
        assert (a - b).abs().max() < 0.1
    for name, grad in gradients(model).items():
        assert grad.dtype == torch.float32 and grad.isfinite().all()
        assert (grad - expected[name]).norm() < 0.1 * expected[name].norm() + 1e-3, name


@WITHOUT_GPU
@pytest.mark.parametrize("train", [False, True])
def test_the_kernels_in_the_interpreter_match_the_reference(train):
    reference = build(BertForPreTraining, train=train, backend="reference")
    kernels = build(BertForPreTraining, train=train, backend="triton")
    batch = labelled()
    a, b = reference(batch, seed=7), kernels(batch, seed=7)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-5, atol=1e-5)
    a.loss.backward()
    b.loss.backward()
    a, b = gradients(reference), gradients(kernels)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@WITHOUT_GPU
def test_32_steps_of_training_on_the_kernels_follow_the_reference():
    runs = []
    for backend in ("reference", "triton"):
        model = build(BertForPreTraining, train=True, backend=backend, num_hidden_layers=1, initializer_range=0.1)
        optimizer, losses = adamw(model, lr=1e-3), []
        for step in range(32):
            loss = model(labelled(((7, 1, 5), (3, 4), (8, 2))[step % 3]), seed=step).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        runs.append((torch.stack(losses), dict(model.named_parameters())))
    (expected, reference), (losses, kernels) = runs
    assert losses[-3:].mean() < losses[:3].mean() - 0.5, "it learns"
    torch.testing.assert_close(losses, expected, rtol=2e-5, atol=0)
    for name in reference:
        # a gradient of almost 0 may have either sign, and AdamW makes a whole step of either
        difference = (kernels[name] - reference[name]).abs()
        assert difference.max() < 1e-3 and difference.mean() < 1e-5, name


@WITHOUT_GPU
def test_the_kernels_without_gpu_or_interpreter_say_what_to_do():
    program = """
import sys
from minibert.batch import pack
from minibert.config import BertConfig
from minibert.model import BertModel
config = BertConfig.preset("bert-tiny", vocab_size=9, num_hidden_layers=1)
try:
    BertModel(config, backend="triton").eval()(pack([[1, 2, 3]]))
except ValueError as error:
    sys.exit(str(error))
"""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("backend='triton' needs CUDA tensors, got cpu: use backend='reference'")
    assert len(done.stderr.strip().splitlines()) == 1


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='cuda' is not one of auto, triton, reference"):
        build(BertModel, backend="cuda")(packed(padded()))
