"""A batch that is padded to a rounded shape gives what it gives alone, and a pool of graphs gives it, too."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from small import LENGTHS, build, gradients, packed, padded, refused
from torch import nn

from minibert.batch import IGNORE, Shape, pack
from minibert.model import MODELS, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel
from minibert.model import graphs as graphs_module
from minibert.model.graphs import GraphPool, Graphs, StaticInputs, key_of

SHAPE = Shape(num_tokens=29, num_sequences=7, max_seqlen=11, mlm_rows=9, token_rows=8)
PADDABLE = [kind for kind in MODELS.values() if kind.paddable]
OTHERS = [kind for kind in MODELS.values() if not kind.paddable]


def targets(kind):
    """Every head's own targets, with one that is ignored already."""
    draw = lambda high, *size: torch.randint(high, size, generator=torch.Generator().manual_seed(3))  # noqa: E731
    name, classes = kind.objective, draw(2, len(LENGTHS)).index_fill(0, torch.tensor(1), IGNORE)
    if name in ("BertForPreTraining", "BertForMaskedLM"):
        made = {"mlm_rows": torch.tensor([2, 9, 20]), "mlm_labels": torch.tensor([4, IGNORE, 7])}
        return made | ({"nsp_labels": classes} if name == "BertForPreTraining" else {})
    if name == "BertForTokenClassification":
        return {"token_labels": draw(2, sum(LENGTHS))}
    if name == "BertForJointClassification":
        return {"labels": classes, "token_rows": torch.tensor([1, 5, 8]), "token_labels": torch.tensor([1, 0, IGNORE])}
    if name == "BertForQuestionAnswering":
        return {"labels": draw(3, len(LENGTHS), 2)}
    return {"labels": classes} if name == "BertForSequenceClassification" else {}


@pytest.mark.parametrize("kind", PADDABLE)
@pytest.mark.parametrize("train", [False, True])
def test_padding_to_a_shape_changes_no_output_no_loss_and_no_gradient(kind, train):
    batch, model = dataclasses.replace(packed(padded()), **targets(kind)), build(kind, train=train)
    found = []
    for given in (batch, batch.padded(SHAPE)):
        model.zero_grad()
        output = model(given, seed=5)
        states = [output.last_hidden_state, output.logits, output.start_logits, output.sentence_embedding]
        loss = output.loss
        if loss is None:
            there = output.last_hidden_state if output.sentence_embedding is None else output.sentence_embedding
            kept = batch.num_tokens if output.sentence_embedding is None else batch.num_sequences
            loss = (there[:kept] ** 2).mean()
        loss.backward()
        found.append((loss.detach(), [x.detach() for x in states if x is not None], gradients(model)))
    (loss, states, ours), (padded_loss, padded_states, theirs) = found
    torch.testing.assert_close(loss, padded_loss, rtol=1e-6, atol=1e-7)
    for one, other in zip(states, padded_states, strict=True):
        torch.testing.assert_close(one, other[: len(one)], rtol=1e-5, atol=1e-6)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_rounded_shape_is_a_function_of_the_sizes_and_little_larger():
    for size in range(1, 3000):
        shape = Shape(num_tokens=size, num_sequences=size, max_seqlen=min(size, 512), mlm_rows=size - 1).rounded(512)
        assert size <= shape.num_tokens == shape.num_sequences <= size * 1.25 + 1 and shape.mlm_rows >= size - 1
        assert min(size, 512) <= shape.max_seqlen <= 512 and shape.token_rows == 0
        assert shape.rounded(512) == shape
    sizes = {Shape(num_tokens=size, num_sequences=1, max_seqlen=1).rounded(512).num_tokens for size in range(512, 4097)}
    assert len(sizes) == 13
    assert Shape(num_tokens=4096, num_sequences=32, max_seqlen=128).rounded(512).num_tokens == 4096
    assert Shape(num_tokens=9, num_sequences=1, max_seqlen=9).rounded(19).max_seqlen == 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.zeros(5)}, r"labels are torch.float32 [5]: only classes of sequences can be padded"),
        ({"labels": torch.zeros(1, dtype=torch.long)}, r"labels are torch.int64 [1]: only classes of sequences"),
        ({"token_rows": torch.zeros(4, dtype=torch.long)}, "token_rows without token_labels belong to sequences"),
    ],
)
def test_targets_that_cannot_be_ignored_are_refused(changes, message):
    assert message in refused(lambda: dataclasses.replace(packed(padded()), **changes).padded(SHAPE))


@pytest.mark.parametrize("name", ["num_tokens", "num_sequences", "max_seqlen", "mlm_rows"])
def test_a_batch_larger_than_the_shape_is_refused(name):
    batch = dataclasses.replace(packed(padded()), **targets(BertForMaskedLM))
    small = dataclasses.replace(SHAPE, **{name: getattr(batch.shape, name) - 1})
    assert refused(lambda: batch.padded(small)).startswith(f"{name}={getattr(batch.shape, name)} of the batch is above")


@pytest.mark.parametrize("kind", PADDABLE)
def test_a_pool_gives_what_the_model_gives_whatever_came_before(kind):
    model = build(kind)
    pool = GraphPool(model)
    for number, lengths in enumerate([LENGTHS, (3,), (7, 2, 5, 3, 7), LENGTHS, (1,) * 4, (2, 1)]):
        batch = packed(padded(lengths, seed=number))
        ours, theirs = pool(batch), model(batch)
        for field in dataclasses.fields(theirs):
            one, other = getattr(ours, field.name), getattr(theirs, field.name)
            assert (one is None) == (other is None), field.name
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5, msg=field.name)
    assert len(pool.slots) == 4


def test_a_pools_output_is_the_callers_own_and_follows_the_weights():
    model = build(BertModel)
    pool, batch = GraphPool(model), packed(padded())
    before = pool(batch).last_hidden_state
    kept = before.clone()
    with torch.no_grad():
        model.embeddings.norm.bias.add_(1.0)
    after = pool(batch).last_hidden_state
    assert torch.equal(before, kept) and not torch.allclose(before, after)
    with torch.inference_mode():
        first = pool(packed(padded((5, 4)))).last_hidden_state
    assert torch.equal(first, pool(packed(padded((5, 4)))).last_hidden_state)


def test_a_pool_passes_large_batches_on_and_captures_the_largest_first():
    pool, seen = GraphPool(build(BertModel), max_tokens=9), []
    assert pool(packed(padded((7, 3)))).last_hidden_state.shape == (10, 24) and not pool.slots
    pool = GraphPool(build(BertModel))
    pool.graphs.call = lambda work: seen.append(0) or work
    pool.prepare([packed(padded(lengths)) for lengths in ((2,), (7, 7), (5, 3))])
    assert [key[1][2][0] for key in pool.slots] == [14, 8, 2] and len(seen) == 3


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_read_across_sequences_have_no_pool(kind):
    assert refused(lambda: GraphPool(build(kind))).startswith(f"{kind.__name__} cannot be captured as a CUDA graph")


def test_a_pool_refuses_targets_training_and_what_is_no_bert():
    model = build(BertForSequenceClassification)
    pool, batch = GraphPool(model), packed(padded())
    assert refused(lambda: pool(dataclasses.replace(batch, **targets(type(model))))).startswith("the batch has labels:")
    model.train()
    assert refused(lambda: pool(batch)) == "the model is in training mode: call model.eval() first"
    assert refused(lambda: GraphPool(nn.Linear(2, 2))).startswith("Linear cannot be captured")


def test_static_inputs_stay_where_they_are_and_take_the_next_batch():
    one, other = (packed(padded(lengths, seed=seed)).padded(SHAPE) for lengths, seed in ((LENGTHS, 1), ((3, 4), 2)))
    assert key_of(one) == key_of(other) != key_of(one.padded(dataclasses.replace(SHAPE, max_seqlen=12)))
    inputs = StaticInputs(one, torch.device("cpu"), seeds=torch.arange(3))
    addresses = [x.data_ptr() for x in inputs.batch.tensors().values()]
    inputs.load(other, seeds=torch.arange(3) + 7)
    assert [x.data_ptr() for x in inputs.batch.tensors().values()] == addresses
    assert all(address % 16 == 0 for address in addresses)
    for name, x in other.tensors().items():
        assert torch.equal(inputs.batch.tensors()[name], x), name
    assert inputs.beside["seeds"].tolist() == [7, 8, 9]


def test_on_a_gpu_work_is_launched_watched_captured_and_then_replayed(monkeypatch):
    """A stand-in for torch.cuda that writes down what is asked of it: the order is what is tested, not a GPU."""
    log = []

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

    class Graph:
        def replay(self):
            log.append("replay")

    class Around:
        def __init__(self, *args, **kwargs):
            self.name = "capture" if kwargs else "stream"

        def __enter__(self):
            log.append(self.name)

        def __exit__(self, *_):
            pass

    cuda = SimpleNamespace(
        Stream=Stream, CUDAGraph=Graph, graph=Around, stream=Around, graph_pool_handle=Stream, current_stream=Stream,
        get_sync_debug_mode=lambda: 0, set_sync_debug_mode=lambda mode: log.append(mode) if mode else None,
    )  # fmt: skip
    monkeypatch.setattr(graphs_module.torch, "cuda", cuda)
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 1)
    graphs = Graphs(torch.device("cuda"))
    call = graphs.call(lambda: log.append(f"work{' captured' * graphs.capturing}"))
    for _ in range(4):
        call()
    launched, watched = ["stream", "work"], ["stream", "error", "work"]
    assert log == [*launched, *watched, "capture", "work captured", "replay", "replay"]
    log.clear()
    late = graphs.call(lambda: log.append("work"))
    for _ in range(4):
        late()
    assert log == [*launched, *watched, *launched, *launched]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [BertModel, BertForSequenceClassification])
def test_a_captured_pass_gives_what_the_model_gives(kind):
    model = build(kind).cuda()
    pool = GraphPool(model)
    for number in range(6):
        batch = packed(padded((7, 1, 5) if number % 2 else (3,), seed=number))
        ours, theirs = pool(batch), model(batch.to("cuda"))
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert pool.graphs.count == 2
    pool.prepare([pack([[5, 6, 7]] * 3)])
    assert pool.graphs.count == 3


@pytest.mark.parametrize("longest", [16, 131])  # the bound says which kernels run, one tile a sequence or many
def test_kernels_keep_what_nobody_wrote_behind_the_last_sequence_out_of_every_gradient(longest, poisoned):
    batch, found = packed(padded((7, 11, 1))), []
    rows, labels, pairs = (torch.tensor(each) for each in ([2, 9], [4, 7], [0, 1, 1]))
    batch = dataclasses.replace(batch, mlm_rows=rows, mlm_labels=labels, nsp_labels=pairs)
    shape = Shape(num_tokens=batch.num_tokens + 3, num_sequences=5, max_seqlen=longest, mlm_rows=4)
    model = build(
        BertForPreTraining,
        train=True,
        backend="triton",
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=longest,
    )
    for given in (batch, batch.padded(shape)):
        model.zero_grad()
        loss = model(given, seed=5).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    torch.testing.assert_close(*(loss for loss, _ in found), rtol=1e-6, atol=1e-7)
    for name in found[0][1]:
        torch.testing.assert_close(*(each[name] for _, each in found), rtol=1e-4, atol=1e-5, msg=name)
