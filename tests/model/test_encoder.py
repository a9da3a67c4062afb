"""The encoder gives a sequence the same states wherever and beside whatever it stands."""

import copy
import io
import pickle

import pytest
import torch
from small import LENGTHS, build, gradients, packed, padded, small_config

from minibert.batch import pack
from minibert.model import FFNS, NORMS, BertForMaskedLM, BertForPreTraining, BertModel
from minibert.model.context import Output

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
WANTED = {"output_hidden_states": True, "output_attentions": True}


def test_the_padded_call_and_the_packed_call_agree():
    model, inputs = build(BertModel), padded()
    mask = inputs["attention_mask"].bool()
    theirs, ours = model(**inputs, output_hidden_states=True), model(packed(inputs), output_hidden_states=True)
    assert torch.equal(theirs.last_hidden_state[mask], ours.last_hidden_state)
    assert torch.equal(theirs.pooler_output, ours.pooler_output)
    for a, b in zip(theirs.hidden_states, ours.hidden_states, strict=True):
        assert torch.equal(a[mask], b)


def test_padding_does_not_change_the_states():
    model, inputs = build(BertModel), padded()
    mask = inputs["attention_mask"].bool()
    states = model(**inputs).last_hidden_state[mask]
    wider = padded(width=13)
    torch.testing.assert_close(model(**wider).last_hidden_state[wider["attention_mask"].bool()], states, **CLOSE)
    other = inputs | {"input_ids": torch.where(mask, inputs["input_ids"], 0)}
    assert torch.equal(model(**other).last_hidden_state[mask], states)


def test_padding_comes_back_as_zero():
    inputs = padded()
    output = build(BertModel)(**inputs, **WANTED)
    away = ~inputs["attention_mask"].bool()
    for state in (output.last_hidden_state, *output.hidden_states):
        assert state.shape == (5, 7, 24)
        assert state[away].abs().sum() == 0 and state[~away].abs().min() > 0


def test_left_padding_with_the_same_positions_gives_the_same_states():
    model, right, left = build(BertModel), padded(), padded(left=True)
    positions = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    a, b = model(**right), model(**left, position_ids=positions)
    masks = (x["attention_mask"].bool() for x in (right, left))
    torch.testing.assert_close(a.last_hidden_state[next(masks)], b.last_hidden_state[next(masks)], **CLOSE)
    torch.testing.assert_close(a.pooler_output, b.pooler_output, **CLOSE)


@pytest.mark.parametrize("left", [False, True])
def test_every_sequence_alone_gives_what_it_gives_in_the_batch(left):
    model, inputs = build(BertModel), padded(left=left)
    together = model(**inputs)
    for row in range(len(LENGTHS)):
        alone = model(**{name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone.last_hidden_state[0], together.last_hidden_state[row], **CLOSE)
        torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[row], **CLOSE)


def test_the_order_of_the_batch_does_not_matter():
    model, inputs, order = build(BertModel), padded(), torch.tensor([3, 0, 4, 2, 1])
    shuffled = model(**{name: value[order] for name, value in inputs.items()})
    torch.testing.assert_close(shuffled.last_hidden_state, model(**inputs).last_hidden_state[order], **CLOSE)


def test_no_token_sees_another_sequence():
    model = build(BertModel)
    a, b = model(pack([[5, 6, 7], [8, 9]])), model(pack([[5, 6, 7], [30, 31]]))
    assert torch.equal(a.last_hidden_state[:3], b.last_hidden_state[:3])
    assert not torch.isclose(a.last_hidden_state[3:], b.last_hidden_state[3:]).all()


def test_every_token_sees_all_of_its_own_sequence():
    model = build(BertModel)
    a, b = model(pack([[5, 6, 7]])), model(pack([[5, 6, 8]]))
    assert ((a.last_hidden_state - b.last_hidden_state).abs().amax(-1) > 1e-3).all()


def test_types_and_positions_matter():
    model = build(BertModel)
    plain = model(pack([[5, 6, 7]])).last_hidden_state
    typed = model(pack([[5, 6, 7]], [[0, 1, 1]])).last_hidden_state
    moved = model(torch.tensor([[5, 6, 7]]), position_ids=torch.tensor([3, 4, 5])).last_hidden_state[0]
    assert (plain - typed).abs().max() > 1e-2 and (plain - moved).abs().max() > 1e-2


def test_hidden_states_are_the_embeddings_and_each_layer():
    model, inputs = build(BertModel), padded()
    output = model(packed(inputs), output_hidden_states=True)
    assert len(output.hidden_states) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert torch.equal(output.hidden_states[0], model.embeddings(model.context(packed(inputs), None)))
    assert output.attentions is None and model(packed(inputs)).hidden_states is None


@pytest.mark.parametrize("left", [False, True])
def test_attention_maps_sum_to_one_over_the_tokens_of_the_row(left):
    inputs = padded(left=left, width=9)
    mask = inputs["attention_mask"].bool()
    maps = build(BertModel)(**inputs, output_attentions=True).attentions
    assert len(maps) == 2
    for probs in maps:
        assert probs.shape == (5, 3, 9, 9)
        rows = probs.sum(-1).transpose(1, 2)
        torch.testing.assert_close(rows[mask], torch.ones_like(rows[mask]))
        assert rows[~mask].abs().sum() == 0
        assert probs.transpose(1, 3)[~mask].abs().sum() == 0, "a padded key was looked at"


def test_attention_maps_of_left_padding_lie_where_the_tokens_are():
    model, left = build(BertModel), padded((3,), width=5, left=True)
    spread = model(**left, output_attentions=True).attentions[0]
    dense = model(
        left["input_ids"][:, 2:],
        token_type_ids=left["token_type_ids"][:, 2:],
        position_ids=torch.arange(2, 5),
        output_attentions=True,
    ).attentions[0]
    assert torch.equal(spread[:, :, 2:, 2:], dense) and spread[:, :, :2].abs().sum() == 0


def test_sequences_without_tokens_are_harmless():
    model = build(BertModel)
    output = model(pack([[], [5, 6, 7], [], [8], []]), **WANTED)
    full = model(pack([[5, 6, 7], [8]]))
    assert torch.equal(output.last_hidden_state, full.last_hidden_state)
    torch.testing.assert_close(output.pooler_output[[1, 3]], full.pooler_output, **CLOSE)
    assert output.pooler_output.isfinite().all() and all(probs.isfinite().all() for probs in output.attentions)
    output.pooler_output.sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_a_row_of_padding_alone_is_harmless():
    inputs = padded()
    inputs["attention_mask"][2] = 0
    output = build(BertModel)(**inputs, **WANTED)
    assert output.last_hidden_state.isfinite().all() and output.last_hidden_state[2].abs().sum() == 0


def test_a_model_without_pooler_has_no_pooled_output():
    model = BertModel(small_config(), add_pooler=False)
    assert model(packed(padded())).pooler_output is None
    assert not any(name.startswith("pooler") for name in model.state_dict())


def _long(**changes):
    return {"input_ids": torch.ones(2, 20, dtype=torch.long)} | changes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_long(), "a sequence has 20 tokens, max_position_embeddings=19: truncate it"),
        ({"input_ids": torch.tensor([[1, 41]])}, "input_ids holds 41: expected 0 to 40"),
        ({"input_ids": torch.tensor([[-1, 4]])}, "input_ids holds -1: expected 0 to 40"),
        (
            {"input_ids": torch.tensor([[1, 2]]), "token_type_ids": torch.tensor([[0, 2]])},
            "token_type_ids holds 2: expected 0 to 1",
        ),
        (
            {"input_ids": torch.tensor([[1, 2]]), "position_ids": torch.tensor([[0, 19]])},
            "positions holds 19: expected 0 to 18",
        ),
        ({"input_ids": torch.tensor([1, 2])}, "input_ids has shape [2]: expected [batch, length]"),
        (
            {"input_ids": pack([[1, 2]]), "attention_mask": torch.ones(1, 2)},
            "a packed Batch carries its own masks, types and positions: pass it alone",
        ),
    ],
)
def test_input_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError) as error:
        build(BertModel)(**change)
    assert str(error.value) == message


def test_ids_at_padding_may_be_anything():
    inputs = padded((2, 4))
    ids = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], 999)
    model = build(BertModel)
    assert torch.equal(model(**inputs)[0], model(**inputs | {"input_ids": ids})[0])


@pytest.mark.parametrize("ffn", FFNS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("act", "position"), [("gelu", "learned"), ("gelu_tanh", "rotary"), ("gelu", "alibi")])
def test_every_combination_of_parts_trains(norm, ffn, act, position):
    model = build(BertForPreTraining, train=True, norm=norm, ffn=ffn, hidden_act=act, position=position)
    batch = packed(padded())
    rows = torch.arange(0, batch.num_tokens, 3)
    batch = pack(
        [x.tolist() for x in batch.input_ids.split(list(batch.lengths))],
        mlm_rows=rows,
        mlm_labels=batch.input_ids[rows],
        nsp_labels=torch.tensor([0, 1, 1, 0, 1]),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for step in range(8):
        optimizer.zero_grad()
        loss = model(batch, seed=step).loss
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.5, losses


def test_parts_compute_what_their_names_say():
    x = torch.randn(7, 24)
    config = small_config()
    ctx = BertModel(config).eval().context(packed(padded((7,))), None)
    gate, value = (mlp := FFNS["geglu"](config)).up(x).chunk(2, -1)
    torch.testing.assert_close(mlp(x, ctx), mlp.down(torch.nn.functional.gelu(gate) * value))
    gate, value = (mlp := FFNS["swiglu"](config)).up(x).chunk(2, -1)
    torch.testing.assert_close(mlp(x, ctx), mlp.down(gate * gate.sigmoid() * value))
    for act, approximate in (("gelu", "none"), ("gelu_tanh", "tanh")):
        mlp = FFNS["mlp"](small_config(hidden_act=act))
        torch.testing.assert_close(mlp(x, ctx), mlp.down(torch.nn.functional.gelu(mlp.up(x), approximate=approximate)))
    expected = torch.nn.functional.layer_norm(x + 1, (24,), eps=1e-12)
    torch.testing.assert_close(NORMS["layernorm"](config)(x, ctx, residual=torch.ones(7, 24)), expected)
    rms = (x + 1) / (x + 1).pow(2).mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(NORMS["rmsnorm"](config)(x, ctx, residual=torch.ones(7, 24)), rms)


def test_weights_start_as_the_paper_says():
    torch.manual_seed(0)
    model = BertForPreTraining(small_config(initializer_range=0.02, hidden_size=48))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.abs().sum() == 0, name
        elif "norm." in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        else:
            assert 0.012 < parameter.std() < 0.027 and parameter.abs().max() < 2, name


def test_tied_weights_are_one_tensor_with_one_gradient():
    model, inputs = build(BertForMaskedLM), padded()
    word, decoder = model.bert.embeddings.word.weight, model.mlm.decoder.weight
    assert word is decoder and word.data_ptr() == decoder.data_ptr()
    assert [name for name, _ in model.named_parameters()].count("bert.embeddings.word.weight") == 1
    assert "mlm.decoder.weight" not in dict(model.named_parameters())
    apart = build(BertForMaskedLM, tie_word_embeddings=False)
    with torch.no_grad():
        for name, parameter in apart.named_parameters():
            parameter.copy_(model.state_dict()[name])
    labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    for each in (model, apart):
        each(**inputs, labels=labels).loss.backward()
    assert apart.mlm.decoder.weight is not apart.bert.embeddings.word.weight
    together = apart.mlm.decoder.weight.grad + apart.bert.embeddings.word.weight.grad
    torch.testing.assert_close(word.grad, together, **CLOSE)


@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "torch.save", "state_dict"])
def test_a_copied_model_gives_the_same_and_stays_tied(copied):
    model, inputs = build(BertForMaskedLM), padded()
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    elif copied == "pickle":
        other = pickle.loads(pickle.dumps(model))
    elif copied == "torch.save":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = build(BertForMaskedLM, seed=5)
        assert not torch.equal(other(**inputs).logits, model(**inputs).logits)
        other.load_state_dict(model.state_dict())
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    assert other.mlm.decoder.weight is other.bert.embeddings.word.weight
    assert other.bert.embeddings.word.weight is not model.bert.embeddings.word.weight
    assert other.config == model.config


def test_an_output_is_indexed_as_hugging_face_does():
    loss, logits, states = torch.zeros(()), torch.ones(2), (torch.ones(3),)
    output = Output(loss=loss, logits=logits, hidden_states=states, mlm_loss=loss, mlm_count=3)
    assert output[0] is loss and output[1] is logits and output[2] is states and len(output.to_tuple()) == 3
    assert output["logits"] is logits and output.mlm_count == 3
    assert Output(logits=logits)[0] is logits
    first, second = build(BertModel)(packed(padded()))
    assert first.shape == (sum(LENGTHS), 24) and second.shape == (5, 24)
    with pytest.raises(IndexError):
        Output(logits=logits)[1]


def test_the_number_of_parameters_is_that_of_bert_base():
    with torch.device("meta"):
        model = BertModel(small_config().preset("bert-base"))
    assert model.num_parameters() == 109_482_240
