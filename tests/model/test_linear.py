"""A residual's gradient is added by the product that makes the other half, to what autograd would have added."""

import copy

import pytest
import torch
import torch.nn.functional as F
from small import build, gradients, packed, padded
from tolerance import BACKWARD, assert_as_accurate
from torch.utils.flop_counter import FlopCounterMode

from minibert.model import BertForMaskedLM, BertModel, linear
from minibert.model.linear import linear_with_residual
from minibert.profile.watch import Traffic

NAMES = ("x", "weight", "bias")


def inputs(*shape, dtype=torch.float32, bias=True):
    """x [*shape, 24], weight [37, 24], bias [37] or None."""
    generator = torch.Generator().manual_seed(3)
    sizes = (*shape, 24), (37, 24), *([(37,)] if bias else [])
    return [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def unfused(x, weight, bias=None):
    return F.linear(x, weight, bias), x


def value(call, tensors):
    """A sum that uses both results of `call`, the residual as nobody but a backward holds its gradient."""
    y, x = call(*tensors)
    return y.sin().sum() + (x * 1.5).square().sum()


def differentiated(call, tensors, wanted=None):
    wanted = tensors if wanted is None else wanted
    return torch.autograd.grad(value(call, tensors), wanted)


def counted(call):
    with Traffic() as traffic:
        call()
    return traffic.calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(13,), (5, 7), (0,)])
def test_gradients_are_as_accurate_as_those_of_the_sum(shape, bias, dtype):
    tensors = inputs(*shape, dtype=dtype, bias=bias)
    exact = differentiated(unfused, [x.detach().double().requires_grad_() for x in tensors])
    both = [differentiated(call, tensors) for call in (linear_with_residual, unfused)]
    for name, ours, torchs, double in zip(NAMES, *both, exact, strict=False):
        assert_as_accurate(ours, torchs, double, factor=BACKWARD, name=name)


@pytest.mark.parametrize("frozen", range(3))
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen):
    tensors = inputs(13)
    tensors[frozen].requires_grad_(False)
    wanted = [x for x in tensors if x.requires_grad]
    ours, torchs = (differentiated(call, tensors, wanted) for call in (linear_with_residual, unfused))
    torch.testing.assert_close(ours, torchs)
    one = [differentiated(linear_with_residual, tensors, [x])[0] for x in wanted]
    torch.testing.assert_close(one, list(torchs))
    if frozen == 0:
        y, x = linear_with_residual(*tensors)
        assert x is tensors[0], "a residual without a gradient is left alone"


def test_one_result_alone_has_its_own_gradient():
    for which in range(2):
        tensors = inputs(13)
        ours, torchs = (
            torch.autograd.grad(call(*tensors)[which].sin().sum(), tensors, allow_unused=True)
            for call in (linear_with_residual, unfused)
        )
        assert [x is None for x in ours] == [x is None for x in torchs]
        torch.testing.assert_close([x for x in ours if x is not None], [x for x in torchs if x is not None])


@pytest.mark.parametrize("narrow", [True, False])
def test_autocast_rounds_what_it_rounds_of_a_linear_layer(narrow):
    tensors, found = inputs(13), []
    if narrow:  # as the layer before gives it
        tensors[0] = tensors[0].detach().bfloat16().requires_grad_()
    for call in (linear_with_residual, unfused):
        with torch.autocast("cpu", torch.bfloat16):
            y, x = call(*tensors)
            # what autocast has kept of a weight still has a gradient for the next who asks
            again = F.linear(tensors[0], tensors[1])
        loss = y.float().sin().sum() + x.float().square().sum() + again.float().sum()
        found.append([y, x, *torch.autograd.grad(loss, tensors)])
    for ours, torchs in zip(*found, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours, torchs, rtol=0.02, atol=0.05)


def test_second_derivatives_are_those_of_a_linear_layer():
    tensors = [x.detach().double().requires_grad_() for x in inputs(3)]
    call = lambda *tensors: linear_with_residual(*tensors)[0] * linear_with_residual(*tensors)[1].sum()  # noqa: E731
    assert torch.autograd.gradcheck(call, tensors) and torch.autograd.gradgradcheck(call, tensors)


@pytest.mark.parametrize("marked", ["residual", "product", None])
def test_a_gradient_is_written_over_only_where_its_user_says_it_may(marked):
    tensors = inputs(13)
    y, x = linear_with_residual(*tensors)
    if marked:
        linear.may_write_over_gradient({"residual": x, "product": y}[marked])
    held, loss = [], y.sin().sum() + (x * 1.5).square().sum()
    x.register_hook(held.append)
    dx = torch.autograd.grad(loss, tensors)[0]
    own = marked == "residual"
    assert (dx.data_ptr() == held[0].data_ptr()) == own
    expected = 2 * 1.5**2 * tensors[0].detach()
    if not own:
        torch.testing.assert_close(held, [expected])
    torch.testing.assert_close(dx - torch.autograd.grad(F.linear(*tensors).sin().sum(), tensors)[0], expected)


@pytest.mark.parametrize("dropout", [0.1, 0.0])
def test_whoever_asks_for_a_gradient_inside_of_a_block_gets_it(monkeypatch, dropout):
    """Where nothing is dropped, the residual's gradient is that of the block's other half, too."""
    found, calls = [], []
    for forks in (True, False):
        if not forks:
            monkeypatch.setattr(linear, "_forks", lambda *_: False)
        model, states = build(BertModel, train=True, hidden_dropout_prob=dropout), []
        for name, module in model.encoder.named_modules():
            if name.count(".") == 2:
                module.register_forward_hook(lambda module, args, out: states.append(out))  # noqa: B023
        loss = model(packed(padded((7, 1, 5))), seed=5).last_hidden_state.sin().sum()
        calls.append(counted(lambda: found.append(torch.autograd.grad(loss, states))))  # noqa: B023
    assert len(found[0]) == 4 * model.config.num_hidden_layers
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    # of the input of the first layer's qkv no gradient was asked for
    assert calls[0]["aten::addmm"] - calls[1]["aten::addmm"] == 2 * model.config.num_hidden_layers - 1


@pytest.mark.parametrize(("backend", "changes"), [
    ("reference", {}), ("reference", {"ffn": "geglu", "position": "rotary", "norm": "rmsnorm"}),
    pytest.param("triton", {}, marks=pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the device")),
])  # fmt: skip
def test_a_step_adds_no_gradients_of_residuals(monkeypatch, backend, changes):
    """Neither where it is recomputed; and its gradients are those of the sums."""
    found = {}
    for forks in (True, False, "recomputed"):
        if not forks:
            monkeypatch.setattr(linear, "_forks", lambda *_: False)
        model = build(BertForMaskedLM, train=True, backend=backend, num_hidden_layers=1, **changes)
        model.bert.encoder.recompute = forks == "recomputed"
        states = model.bert(packed(padded((7, 1, 5))), seed=5).last_hidden_state
        calls = counted(states.sin().sum().backward)
        found[forks] = gradients(model), calls
        monkeypatch.undo()
    for forks in (True, "recomputed"):
        torch.testing.assert_close(found[forks][0], found[False][0], rtol=1e-4, atol=1e-5)
        assert found[forks][1]["aten::addmm"] - found[False][1]["aten::addmm"] >= 2  # qkv and up
        assert found[False][1]["aten::add"] - found[True][1]["aten::add"] == 2


def test_counters_of_flops_see_every_product(monkeypatch):
    model, found = build(BertModel, train=True), []
    for forks in (True, False):
        if not forks:
            monkeypatch.setattr(linear, "_forks", lambda *_: False)
        with FlopCounterMode(display=False) as counter:
            model(packed(padded()), seed=5).last_hidden_state.sin().sum().backward()
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 0


def test_a_hook_of_a_layer_is_called_as_torch_calls_it():
    model, seen = build(BertModel), []
    qkv = model.encoder.layers[0].attention.qkv
    qkv.register_forward_pre_hook(lambda module, args: seen.append(args))
    model(packed(padded()), seed=5)
    assert type(qkv) is torch.nn.Linear and len(seen[0]) == 1


def test_a_backward_hook_sees_the_gradient_by_its_module_alone():
    model, seen = build(BertModel), []
    layer = model.encoder.layers[0]
    layer.attention.qkv.register_full_backward_hook(lambda module, dx, dy: seen.append((dx[0], dy[0])))
    layer.attention.register_full_backward_hook(lambda module, dx, dy: seen.append(dx[0]))
    model(packed(padded()), seed=5).last_hidden_state.sin().sum().backward()
    (dx, dy), outer = seen
    torch.testing.assert_close(dx, dy @ layer.attention.qkv.weight)
    torch.testing.assert_close(outer, dx)


def test_whatever_stands_in_the_place_of_the_layer_is_called_as_it_was():
    class Other(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    model, plain = build(BertModel), build(BertModel)
    for layer in model.encoder.layers:
        layer.attention.qkv, layer.ffn.up = Other(layer.attention.qkv), Other(layer.ffn.up)
    states = [each(packed(padded()), seed=5).last_hidden_state for each in (model, plain)]
    assert torch.equal(*states)
    for x in states:
        x.sin().sum().backward()
    found = {name.replace(".inner", ""): x for name, x in gradients(model).items()}
    torch.testing.assert_close(found, gradients(plain))


def test_a_model_that_forks_can_be_copied():
    model = build(BertModel)
    torch.testing.assert_close(copy.deepcopy(model)(packed(padded()))[0], model(packed(padded()))[0])
