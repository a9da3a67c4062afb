"""The graphed step makes the steps of the eager one, from fixed addresses and without the host, or it refuses to."""

import dataclasses
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from small import build, refused
from tiny_run import KINDS, Stream, evaluate_loss, make_config, make_model, run
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from minibert.batch import pack
from minibert.model import BertForMultipleChoice, BertForTokenClassification
from minibert.profile.watch import HostReads, Watch, meta_twin, tensors_of
from minibert.train import NonFiniteError, TrainConfig, read_metrics
from minibert.train.checkpoint import Run
from minibert.train.distributed import World
from minibert.train.graph import GraphedStep
from minibert.train.loop import TrainingLoop
from minibert.train.optim import CAPTURABLE, OPTIMIZERS, cut_by_depth

SIZES = (5, 3, 8)  # sequences of the batches, in turn
SHARE = {"mlm_loss": 1.0, "nsp_loss": 0.5}


class Crash(Exception):
    pass


def trainer(run_dir, kind="pretraining", *, graphed, data=None, resume=False, model=None, evaluate=None, **changes):
    """A `TrainingLoop` on the CPU, where the graphed step runs as it does on a GPU, but is not captured."""
    model, data = model or make_model(kind), data or Stream(kind, SIZES)
    made = TrainingLoop(model, data, evaluate, make_config(**changes), Run(run_dir, resume), None, KINDS[kind][1], {})
    if graphed:
        made.work = GraphedStep(made.model, made.optimizer, made.config, made.weights)
    return made


def logged(run_dir, *names):
    return [[record.get(name) for name in names] for record in read_metrics(run_dir / "metrics.jsonl")]


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pretraining", {}),
        ("classification", {"clip": None}),
        ("pretraining", {"accumulate": 3, "ramp": 0.5}),
        ("pretraining", {"optimizer": "lamb"}),
        ("classification", {"optimizer": "bertadam", "layer_decay": 0.7}),
        ("classification", {"ema": 0.9}),
        ("pretraining", {"dtype": "bfloat16"}),
    ],
)
def test_batches_of_many_sizes_give_the_losses_and_the_weights_of_the_eager_step(tmp_path, kind, changes):
    (tmp_path / "eager").mkdir(), (tmp_path / "graphed").mkdir()
    eager, graphed = (trainer(tmp_path / name, kind, graphed=name == "graphed", **changes)
                      for name in ("eager", "graphed"))  # fmt: skip
    before = weights_of(eager.model)
    eager.run(), graphed.run()
    names = ("step", "loss", "grad_norm", "learning_rate")
    close = 1e-3 if "dtype" in changes else 1e-5
    np.testing.assert_allclose(*(logged(tmp_path / name, *names) for name in ("eager", "graphed")), rtol=close)
    assert len(graphed.work.slots) > 1
    for (name, ours), theirs in zip(weights_of(eager.model).items(), weights_of(graphed.model).values(), strict=True):
        moved = float((ours - before[name]).norm())
        assert float((ours - theirs).norm()) <= close * 10 * moved + 1e-7, name


class Full(Stream):
    """Sequences as long as the positions, so that padding adds nothing."""

    def make(self, numbers):
        rng = np.random.default_rng(numbers[0])
        ids = rng.integers(5, 37, (len(numbers), 16))
        classes = torch.from_numpy(rng.integers(0, 2, len(numbers)))
        return pack(list(ids), seq_ids=numbers, labels=classes)


def test_a_batch_that_needs_no_padding_gives_the_same_bits(tmp_path):
    models = []
    for graphed in (False, True):
        # a rate that float32 holds exactly, as the optimizer reads it from the device
        options = {"lr": 2.0**-8, "schedule": "constant", "warmup": 0, "steps": 4, "log_every": 1}
        (tmp_path / str(graphed)).mkdir()
        made = trainer(
            tmp_path / str(graphed), "classification", graphed=graphed, data=Full("classification", (4, 8)), **options
        )
        made.run()
        models.append(made.model)
    assert logged(tmp_path / "True", "loss", "grad_norm") == logged(tmp_path / "False", "loss", "grad_norm")
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other), name


def test_gradients_weights_moments_inputs_and_rates_stay_where_they_are(tmp_path):
    made = trainer(tmp_path, graphed=True, steps=9, accumulate=2)

    def addresses():
        found = {name: p.data_ptr() for name, p in made.model.named_parameters()}
        found |= {f"{name}.grad": p.grad.data_ptr() for name, p in made.model.named_parameters() if p.grad is not None}
        for p, state in made.optimizer.state.items():
            found |= {(p, name): x.data_ptr() for name, x in state.items()}
        for key, slot in made.work.slots.items():
            found |= {(key, name): x.data_ptr() for name, x in slot.inputs.batch.tensors().items()}
        return found | {number: group["lr"].data_ptr() for number, group in enumerate(made.optimizer.param_groups)}

    step, seen = made.work.update, []
    made.work.update = lambda lr: (step(lr), seen.append(addresses()))
    made.run()
    assert len(seen) == 9 and len(made.work.slots) > 1
    for earlier, later in zip(seen[:-1], seen[1:], strict=True):
        assert earlier.items() <= later.items()


class Ops(Watch):
    """Every op with the shapes it sees and the numbers it is given, which a graph would keep; nothing on the host."""

    def __init__(self):
        super().__init__()
        self.log = []

    def see(self, func, args, kwargs):
        result = func(*args, **kwargs)
        tensors = tensors_of(args, kwargs, result)
        assert not [x for x in tensors if x.device.type == "cpu"], func
        shapes = tree_map_only(Tensor, lambda x: (x.dtype, x.shape, x.stride()), (args, kwargs))
        self.log.extend([(func, str(shapes))] * (func.namespace != "profiler"))  # whose records have addresses
        return result


def work_on_meta(batches, optimizer="bertadam", change=lambda model: None, reads=None):
    """A step on the meta device, where nothing has a value to ask for; then what would be captured, op by op."""
    model, reads = meta_twin(make_model("pretraining")).train(), reads or HostReads()
    change(model)
    made = OPTIMIZERS[optimizer](model, 1e-3)
    cut_by_depth(model, made, 1.0, 0.0)
    step = GraphedStep(model, made, make_config(optimizer=optimizer), {})
    with reads:
        step.begin(batches[0], SHARE)
        step.gradients(0, batches, [SHARE] * len(batches))
        step.update(1e-3)
    with Ops() as ops:
        for slot in step.slots.values():
            slot._backward()
        step._clip()
        step._optimize()
    return dict(reads.found), ops.log


@pytest.mark.parametrize("optimizer", ["bertadam", "lamb"])
def test_no_op_of_a_step_makes_the_host_wait_and_what_is_captured_does_not_touch_it(optimizer):
    stream = Stream("pretraining", SIZES)
    found, log = work_on_meta([stream.make(range(5)), stream.make(range(5, 8))], optimizer)
    assert found == {} and len(log) > 500


def two_of_one_shape():
    """Batches that are padded to one shape, with other lengths, also of the longest."""
    stream = Stream("pretraining", SIZES)
    found = {}
    for start in range(0, 99, 5):
        batch = stream.make(range(start, start + 5))
        other = found.setdefault(batch.shape.rounded(16), batch)
        if other.max_seqlen != batch.max_seqlen:
            return other, batch


def test_what_is_captured_is_the_same_whatever_batch_of_its_shape_came_first():
    one, other = two_of_one_shape()
    assert work_on_meta([one])[1] == work_on_meta([other])[1]


class Around(nn.Module):
    """A feed-forward part with something before it."""

    def __init__(self, inner, before):
        super().__init__()
        self.inner, self.before = inner, before

    def forward(self, x, ctx):
        return self.inner(self.before(x, ctx), ctx)


def planted(before):
    def change(model):
        layer = model.bert.encoder.layers[0]
        layer.ffn = Around(layer.ffn, before)

    return change


def test_a_part_that_waits_touches_the_host_or_keeps_a_length_is_found():
    one, other = two_of_one_shape()
    reads = HostReads()
    with pytest.raises(RuntimeError, match="cannot be called on meta tensors"):
        work_on_meta([one], change=planted(lambda x, ctx: x + bool(x.sum() > 0)), reads=reads)
    assert {where.split(":")[0] for where, _ in reads.found} == {"test_graph.py"}
    with pytest.raises(AssertionError, match="aten.lift_fresh"):
        work_on_meta([one], change=planted(lambda x, ctx: x + torch.tensor(1.0)))
    lengths = planted(lambda x, ctx: x * max(ctx.batch.lengths))
    assert work_on_meta([one], change=lengths)[1] != work_on_meta([other], change=lengths)[1]


def test_adamw_reads_its_rate_where_the_step_writes_it(tmp_path):
    made = trainer(tmp_path, graphed=True, steps=2)
    made.run()
    seen = []

    class Names(Watch):
        def see(self, func, args, kwargs):
            seen.extend([func] * (func.namespace == "aten"))
            return func(*args, **kwargs)

    with Names():
        made.work._optimize()
    aten = torch.ops.aten
    assert set(seen) == {aten._foreach_add_.Scalar, aten._fused_adamw_.tensor_lr}


def test_a_resumed_run_equals_one_that_never_stopped_and_its_checkpoint_is_an_eager_ones(tmp_path):
    def crash(cursor):
        if cursor == 32:
            raise Crash

    for name in ("whole", "cut", "eager"):
        (tmp_path / name).mkdir()
    options = {"evaluate": evaluate_loss, "eval_every": 4}
    whole = trainer(tmp_path / "whole", "classification", graphed=True, **options)
    whole.run()
    broken = Stream("classification", SIZES, before=crash)
    with pytest.raises(Crash):
        trainer(tmp_path / "cut", "classification", graphed=True, data=broken, **options).run()
    trainer(tmp_path / "cut", "classification", graphed=True, resume=True, **options).run()
    eager = trainer(tmp_path / "eager", "classification", graphed=False, **options)
    eager.run()
    files = {path.name for path in (tmp_path / "eager" / "step-10").iterdir()}
    for name in files:
        ours = (tmp_path / "whole" / "step-10" / name).read_bytes()
        assert ours == (tmp_path / "cut" / "step-10" / name).read_bytes(), name
        if name.endswith(".safetensors"):
            theirs = safetensors.torch.load((tmp_path / "eager" / "step-10" / name).read_bytes())
            ours = safetensors.torch.load(ours)
            assert {n: (x.dtype, x.shape) for n, x in ours.items()} == {
                n: (x.dtype, x.shape) for n, x in theirs.items()
            }
    # and each goes on from the other's
    _, result = run(
        tmp_path / "cut", "classification", config=make_config(eval_every=4), data=Stream("classification", SIZES),
        evaluate=evaluate_loss, resume=True,
    )  # fmt: skip
    assert result.step == 10


def test_a_bad_step_does_not_reach_the_weights(tmp_path):
    made = trainer(tmp_path, "classification", graphed=True, steps=5, skip=1)
    original, seen = made.work.gradients, []

    def gradients(step, batches, shares):
        values = original(step, batches, shares)
        if step == 2:
            values[0] = math.inf
        seen.append(weights_of(made.model))
        return values

    made.work.gradients = gradients
    made.run()
    same = [
        all(torch.equal(one[name], other[name]) for name in one) for one, other in zip(seen, seen[1:], strict=False)
    ]
    assert same == [False, False, True, False]
    assert [record.get("skipped") for record in read_metrics(tmp_path / "metrics.jsonl")][2].startswith("the norm of")
    made.work.gradients = lambda *args: original(*args) * math.nan
    made.over, made.config = False, dataclasses.replace(made.config, steps=9)
    with pytest.raises(NonFiniteError):
        made.run()


def test_a_head_without_an_objective_has_no_gradient_no_state_and_is_not_decayed(tmp_path):
    model = make_model("pretraining")
    before = weights_of(model)
    data = Stream("pretraining", SIZES)
    made = TrainingLoop(
        model, data, None, make_config(steps=3), Run(tmp_path, False), None,
        lambda batch: {"mlm_loss": len(batch.mlm_rows)}, {},
    )  # fmt: skip
    made.work = GraphedStep(made.model, made.optimizer, made.config, made.weights)
    made.run()
    assert model.nsp.weight.grad is None and model.nsp.weight not in made.optimizer.state
    assert torch.equal(model.nsp.weight, before["nsp.weight"])
    assert not torch.equal(model.mlm.dense.weight, before["mlm.dense.weight"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "cpu"}, "cuda_graph=True needs a GPU, not device='cpu': use cuda_graph=False"),
        ({"optimizer": "sgd"}, "cuda_graph=True: optimizer='sgd' reads the learning rate on the host: use one of"),
        ({"unfreeze": 0.5}, "cuda_graph=True does not go with unfreeze=0.5: use one of the two"),
        ({"split_on_oom": True}, "cuda_graph=True does not go with split_on_oom=True"),
        ({"checkpoint_activations": True}, "cuda_graph=True does not go with checkpoint_activations=True"),
    ],
)
def test_options_that_do_not_go_together_are_named(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    config = {"steps": 3, "device": "cuda", "cuda_graph": True}
    assert refused(lambda: TrainConfig(**config | changes)).startswith(message)
    for optimizer in CAPTURABLE:
        alone = TrainConfig(**config, optimizer=optimizer).alone
    with pytest.raises(ValueError, match="cuda_graph=True is for one process, not for 2"):
        World(0, 2).check(2, **alone)


def test_what_cannot_be_captured_is_refused_before_a_step(tmp_path):
    crf = build(BertForTokenClassification, task_specific_params={"crf": True})
    for model, name in ((crf, "a CRF"), (build(BertForMultipleChoice), "BertForMultipleChoice")):
        optimizer = OPTIMIZERS["adamw"](model, 1e-3)
        line = refused(lambda model=model, optimizer=optimizer: GraphedStep(model, optimizer, make_config(), {}))
        assert line.startswith(f"{name} cannot be captured as a CUDA graph")
    made = trainer(tmp_path, "classification", graphed=True)
    batch = dataclasses.replace(Stream().make(range(5)), labels=torch.zeros(5))
    line = refused(lambda: made.work.begin(batch, {"loss": 1.0}))
    assert line.startswith("cuda_graph=True: labels are torch.float32 [5]: only classes")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", CAPTURABLE)
def test_captured_steps_learn_what_launched_ones_do(tmp_path, optimizer, dtype):
    options = {"device": "cuda", "optimizer": optimizer, "dtype": dtype, "steps": 24, "save_every": 24}
    losses = {}
    for graphed in (False, True):
        model = make_model("pretraining")
        for part in model.modules():
            if hasattr(part, "backend"):
                part.backend = "auto"
        config = make_config(**options, cuda_graph=graphed)
        run(tmp_path / str(graphed), "pretraining", config=config, data=Stream("pretraining", SIZES), model=model)
        losses[graphed] = logged(tmp_path / str(graphed), "loss", "grad_norm")
    np.testing.assert_allclose(losses[True], losses[False], rtol=2e-2 if dtype == "bfloat16" else 1e-3)
