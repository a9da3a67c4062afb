import pytest
import torch
from tiny_run import make_model

from minibert.train.optim import adamw, load_optimizer_state, optimizer_state, param_groups


def step(model, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_matrices_decay_and_biases_and_norms_do_not():
    model = make_model("pretraining")
    decayed, plain = param_groups(model, 0.3)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or "norm.weight" in names[id(p)] for p in plain["params"])


def test_a_tied_parameter_is_counted_once():
    model = make_model("pretraining")
    grouped = [p for group in param_groups(model, 0.1) for p in group["params"]]
    assert model.mlm.decoder.weight is model.bert.embeddings.word.weight
    assert len(grouped) == len({id(p) for p in grouped}) == len(list(model.parameters()))


def test_a_frozen_parameter_is_in_no_group():
    model = make_model()
    model.bert.embeddings.requires_grad_(False)
    grouped = {id(p) for group in param_groups(model, 0.1) for p in group["params"]}
    assert id(model.classifier.weight) in grouped and id(model.bert.embeddings.word.weight) not in grouped


def test_adamw_makes_the_step_of_its_formula():
    model = torch.nn.Linear(3, 2)
    before, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    step(model, optimizer, 0)
    moved = before * (1 - 0.1 * 0.5) - 0.1 * model.weight.grad / (model.weight.grad.abs() + 1e-6)
    torch.testing.assert_close(model.weight.detach(), moved)
    torch.testing.assert_close(model.bias.detach(), bias - 0.1 * model.bias.grad / (model.bias.grad.abs() + 1e-6))


def test_the_optimizer_state_survives_bit_for_bit():
    models = [make_model("pretraining") for _ in range(2)]
    optimizers = [adamw(model, 1e-2) for model in models]
    for seed in (1, 2):
        step(models[0], optimizers[0], seed)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_state(models[1], optimizers[1], optimizer_state(models[0], optimizers[0]))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    states = [optimizer_state(*pair) for pair in zip(models, optimizers, strict=True)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_parameter_without_gradients_has_no_state_and_needs_none():
    model = make_model()
    optimizer = adamw(model, 1e-2)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    assert {name.rpartition(".")[0] for name in state} == {"classifier.weight"}
    fresh = adamw(model, 1e-2)
    load_optimizer_state(model, fresh, state)
    assert list(fresh.state) == [model.classifier.weight]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("classifier.bias.exp_avg"), "classifier.bias has no exp_avg"),
        (lambda s: s.update({"classifier.bias.exp_avg": torch.zeros(3)}), r"exp_avg has shape \[3\]: expected \[2\]"),
        (lambda s: s.update({"other.weight.step": torch.zeros(())}), "unknown parameters: other.weight.step"),
    ],
)
def test_an_optimizer_state_that_does_not_fit_is_refused(spoil, message):
    model = make_model()
    optimizer = adamw(model, 1e-2)
    step(model, optimizer, 0)
    state = optimizer_state(model, optimizer)
    spoil(state)
    with pytest.raises(ValueError, match=message):
        load_optimizer_state(model, adamw(model, 1e-2), state)
