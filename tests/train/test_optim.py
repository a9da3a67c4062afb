import numpy as np
import pytest
import torch
from tiny_run import make_model

from minibert.train.optim import (
    OPTIMIZERS,
    Lamb,
    adamw,
    cut_by_depth,
    depths,
    drop_frozen,
    lamb,
    load_optimizer_state,
    optimizer_state,
    param_groups,
)


@pytest.fixture(params=OPTIMIZERS)
def build(request):
    return OPTIMIZERS[request.param]


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


def test_embeddings_lie_deepest_and_the_pooler_with_the_head():
    known = depths(make_model(num_hidden_layers=11))
    assert known["bert.embeddings.position.weight"] == known["bert.embeddings.norm.bias"] == 0
    assert known["bert.encoder.layers.0.ffn_norm.weight"] == 1 and known["bert.encoder.layers.10.ffn_norm.bias"] == 11
    assert known["classifier.bias"] == known["bert.pooler.dense.weight"] == 12
    assert set(known) == {name for name, _ in make_model(num_hidden_layers=11).named_parameters()}
    assert depths(make_model("pretraining").bert)["encoder.layers.0.ffn_norm.bias"] == 1, "of an encoder alone, too"


def test_a_group_for_each_depth_keeps_the_options_of_the_one_it_was_cut_from(build):
    model = make_model("pretraining", num_hidden_layers=2)
    optimizer = build(model, 0.1, 0.3)
    cut_by_depth(model, optimizer, 0.5, 0.6)
    names = {p: name for name, p in model.named_parameters()}
    grouped = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(names)
    for p, group in grouped:
        below = 3 - depths(model)[names[p]]
        assert group["scale"] == 0.5**below and group["thaw"] == pytest.approx(0.6 * below / 3)
        assert group["weight_decay"] == (0.3 if p.ndim >= 2 else 0.0)
        assert group.get("adapt", p.ndim >= 2 and build is lamb) == (p.ndim >= 2 and build is lamb)


def test_without_a_decay_there_are_no_more_groups_than_before(build):
    model = make_model(num_hidden_layers=2)
    optimizer = build(model, 0.1)
    cut_by_depth(model, optimizer, 1.0, 0.0)
    assert [(group["scale"], group["thaw"]) for group in optimizer.param_groups] == [(1.0, 0.0)] * 2


def test_what_is_frozen_neither_moves_nor_has_moments(build):
    model = make_model(num_hidden_layers=2)
    optimizer = build(model, 0.1, 0.3)
    cut_by_depth(model, optimizer, 1.0, 0.6)
    for progress, thawed in ((0.1, {3}), (0.2, {2, 3}), (0.45, {1, 2, 3}), (0.6, {0, 1, 2, 3})):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        drop_frozen(optimizer, progress)
        optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, depth in depths(model).items() if depth in thawed}
        assert {name.rpartition(".")[0] for name in optimizer_state(model, optimizer)} == moved


def test_adamw_makes_the_step_of_its_formula():
    model = torch.nn.Linear(3, 2)
    before, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    step(model, optimizer, 0)
    moved = before * (1 - 0.1 * 0.5) - 0.1 * model.weight.grad / (model.weight.grad.abs() + 1e-6)
    torch.testing.assert_close(model.weight.detach(), moved)
    torch.testing.assert_close(model.bias.detach(), bias - 0.1 * model.bias.grad / (model.bias.grad.abs() + 1e-6))


def oracle_adamw(w, m, v, g, t, decay, correct):
    m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g * g
    unbias1, unbias2 = (1 - 0.9**t, 1 - 0.98**t) if correct else (1, 1)
    return w - 0.1 * (m / unbias1 / (np.sqrt(v / unbias2) + 1e-3) + decay * w), m, v


def oracle_sgd(w, m, v, g, t, decay, correct):
    m = 0.9 * m + g + decay * w
    return w - 0.1 * m, m, v


@pytest.mark.parametrize(
    ("word", "oracle", "correct"),
    [("adamw", oracle_adamw, True), ("bertadam", oracle_adamw, False), ("sgd", oracle_sgd, None)],
)
def test_three_steps_are_those_of_a_few_lines_of_numpy(word, oracle, correct):
    model = torch.nn.Linear(3, 2)
    ours = {name: (p.detach().double().numpy(), 0.0, 0.0) for name, p in model.named_parameters()}
    optimizer = OPTIMIZERS[word](model, 0.1, 0.5, (0.9, 0.98), 1e-3)
    for t in (1, 2, 3):
        step(model, optimizer, t)
        for name, p in model.named_parameters():
            decay = 0.5 if name == "weight" else 0.0
            ours[name] = oracle(*ours[name], p.grad.double().numpy(), t, decay, correct)
            np.testing.assert_allclose(p.detach().numpy(), ours[name][0], rtol=1e-5, atol=1e-6)


def test_lamb_makes_the_step_of_its_formula_and_biases_that_of_adamw():
    model, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    before = model.weight.detach().clone()
    optimizer, other = lamb(model, lr=0.1, weight_decay=0.5), adamw(twin, lr=0.1, weight_decay=0.5)
    step(model, optimizer, 0)
    step(twin, other, 0)
    u = model.weight.grad / (model.weight.grad.abs() + 1e-6) + 0.5 * before
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * before.norm() / u.norm() * u)
    torch.testing.assert_close(model.bias, twin.bias)


def test_a_step_of_lamb_moves_every_matrix_by_the_same_share():
    model = make_model("pretraining")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step(model, lamb(model, lr=0.03, weight_decay=0.0), 0)
    for name, p in model.named_parameters():
        if p.ndim >= 2:
            share = (p - before[name]).norm() / before[name].norm()
            assert share.item() == pytest.approx(0.03, rel=1e-3), name


def test_parameters_of_lamb_count_their_own_steps():
    model, alone = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    alone.load_state_dict(model.state_dict())
    optimizer, other = (Lamb(m.parameters(), lr=0.1) for m in (model, alone))
    model.bias.grad = torch.ones(2)
    for _ in range(3):
        optimizer.step()
    assert list(optimizer.state) == [model.bias]
    for m, o in ((model, optimizer), (alone, other)):
        m.weight.grad, m.bias.grad = torch.ones(2, 3), None
        o.step()
    assert torch.equal(model.weight, alone.weight)
    assert optimizer.state[model.weight]["step"] == 1 and optimizer.state[model.bias]["step"] == 3


def test_lamb_runs_its_closure_with_gradients_and_reads_groups_of_their_own():
    fast, slow = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    optimizer = Lamb([{"params": [fast]}, {"params": [slow], "lr": 0.01, "trust_clip": 0.5}], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = fast.sum() + slow.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 8
    torch.testing.assert_close(fast.detach(), torch.full((4,), 0.9))
    torch.testing.assert_close(slow.detach(), torch.full((4,), 1 - 0.005))


def test_lamb_names_the_option_that_makes_no_sense():
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    with pytest.raises(ValueError, match=r"betas=\(0.9, 1.0\) are not in \[0, 1\)"):
        Lamb([p], betas=(0.9, 1.0)).step()


def test_the_optimizer_state_survives_bit_for_bit(build):
    models = [make_model("pretraining") for _ in range(2)]
    optimizers = [build(model, 1e-2) for model in models]
    for seed in (1, 2):
        step(models[0], optimizers[0], seed)
    models[1].load_state_dict(models[0].state_dict())
    load_optimizer_state(models[1], optimizers[1], optimizer_state(models[0], optimizers[0]))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer, 3)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    states = [optimizer_state(*pair) for pair in zip(models, optimizers, strict=True)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_a_parameter_without_gradients_has_no_state_and_needs_none(build):
    model = make_model()
    optimizer = build(model, 1e-2)
    model.classifier.weight.grad = torch.ones_like(model.classifier.weight)
    optimizer.step()
    state = optimizer_state(model, optimizer)
    assert {name.rpartition(".")[0] for name in state} == {"classifier.weight"}
    fresh = build(model, 1e-2)
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
@pytest.mark.parametrize("build", [adamw, lamb])
def test_an_optimizer_state_that_does_not_fit_is_refused(build, spoil, message):
    model = make_model()
    optimizer = build(model, 1e-2)
    step(model, optimizer, 0)
    state = optimizer_state(model, optimizer)
    spoil(state)
    with pytest.raises(ValueError, match=message):
        load_optimizer_state(model, build(model, 1e-2), state)
