"""What is saved loads bit for bit, and what cannot be loaded is told in one line."""

import json
import os
import pickle
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from small import build, packed, padded, small_config, with_ends

from minibert.config import BertConfig
from minibert.hub import (
    ARCHITECTURES,
    WEIGHTS,
    architecture,
    hf_state,
    load_config,
    load_into,
    load_state,
    stored_names,
)
from minibert.model import (
    MODELS,
    NORMS,
    BertForJointClassification,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)

INDEX = "model.safetensors.index.json"
KINDS = list(MODELS.values())


def config_file(**changes) -> dict:
    config = small_config().to_dict() | {"model_type": "bert"} | changes
    for slot in ("norm", "ffn", "position", "block", "id2label"):
        config.pop(slot)
    return config


def write(directory, state, config=None):
    """A checkpoint as others write it, without a manifest."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_file() if config is None else config))
    save_file({name: value.contiguous().clone() for name, value in state.items()}, directory / WEIGHTS)
    return directory


def equal(a, b):
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refused(call, *parts):
    """The message of the ValueError that `call` raises: one line that holds all `parts`."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message, message
    for part in parts:
        assert part in message, message
    return message


@pytest.fixture(scope="module")
def trained():
    return build(BertForPreTraining)


@pytest.fixture
def saved(tmp_path, trained):
    trained.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tie", [True, False])
def test_what_is_saved_loads_bit_for_bit(tmp_path, kind, tie):
    labels = ("no", "yes") if kind is BertForQuestionAnswering else ("no", "yes", "maybe")
    model = build(kind, tie_word_embeddings=tie, id2label=labels, classifier_dropout=0.2, finetuning_task="x")
    model.save_pretrained(tmp_path / "new" / "place")
    loaded = kind.from_pretrained(str(tmp_path / "new" / "place"))
    assert equal(model, loaded) and loaded.config == model.config
    assert loaded.new_parameters == () and not loaded.training
    batch = with_ends(packed(padded()))
    for a, b in zip(loaded(batch).to_tuple(), model(batch).to_tuple(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "slots", [{"norm": "rmsnorm", "ffn": "swiglu"}, {"ffn": "geglu"}, {"position": "rotary"}, {"position": "alibi"}]
)
def test_another_architecture_is_saved_under_its_own_model_type(tmp_path, slots):
    model = build(BertForMaskedLM, **slots)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "minibert"
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert equal(model, loaded) and loaded.config == model.config


def test_a_part_from_outside_is_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(NORMS, "mine", NORMS["layernorm"])
    model = build(BertModel, norm="mine")
    model.save_pretrained(tmp_path)
    assert equal(BertModel.from_pretrained(tmp_path), model)
    monkeypatch.delitem(NORMS, "mine")
    refused(lambda: BertModel.from_pretrained(tmp_path), "norm='mine' is not one of layernorm, rmsnorm")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_saved_as_they_are_and_loaded_as_float32(tmp_path, dtype):
    model = build(BertModel).to(dtype)
    model.save_pretrained(tmp_path)
    assert {value.dtype for value in load_state(tmp_path).values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = BertModel.from_pretrained(tmp_path)
    assert all(
        torch.equal(a.to(dtype), b) and a.dtype == torch.float32
        for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
    )


def test_the_names_on_disk_are_hugging_faces(saved):
    names = set(load_state(saved))
    assert "bert.encoder.layer.1.attention.self.query.weight" in names
    assert {"bert.embeddings.LayerNorm.bias", "cls.predictions.bias", "cls.seq_relationship.weight"} <= names
    assert "cls.predictions.decoder.weight" not in names, "tied weights are stored once"
    assert len(names) == 5 + 2 * 16 + 2 + 5 + 2


def test_keys_and_values_are_rows_of_the_fused_projection(trained):
    state, fused = hf_state(trained), trained.bert.encoder.layers[1].attention.qkv
    for part, name in enumerate(("query", "key", "value")):
        prefix = f"bert.encoder.layer.1.attention.self.{name}"
        assert torch.equal(state[f"{prefix}.weight"], fused.weight[24 * part : 24 * (part + 1)])
        assert torch.equal(state[f"{prefix}.bias"], fused.bias[24 * part : 24 * (part + 1)])


def test_old_names_and_buffers_of_published_checkpoints_load(tmp_path, trained):
    renames = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, value in hf_state(trained).items():
        for new, old in renames.items():
            name = name.replace(new, old)
        state[name] = value
    state["bert.embeddings.position_ids"] = torch.arange(19)[None]
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
    loaded = BertForPreTraining.from_pretrained(write(tmp_path, state))
    assert equal(loaded, trained) and loaded.config.tie_word_embeddings


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_the_encoder_loads_with_and_without_prefix(tmp_path, trained, prefix):
    encoder = {n.removeprefix("bert."): v for n, v in hf_state(trained).items() if n.startswith("bert.")}
    write(tmp_path, {prefix + name: value for name, value in encoder.items()})
    assert equal(BertModel.from_pretrained(tmp_path), trained.bert)
    headed = BertForPreTraining.from_pretrained(tmp_path)
    assert equal(headed.bert, trained.bert)
    assert set(headed.new_parameters) == {
        "mlm.dense.weight", "mlm.dense.bias", "mlm.norm.weight", "mlm.norm.bias", "mlm.decoder.bias", "nsp.weight",
        "nsp.bias",
    }  # fmt: skip


def test_a_decoder_that_differs_from_the_embedding_is_kept_apart(tmp_path):
    model = build(BertForMaskedLM, tie_word_embeddings=False)
    write(tmp_path, hf_state(model), config_file(tie_word_embeddings=True))
    loaded = BertForMaskedLM.from_pretrained(tmp_path)
    assert equal(loaded, model) and loaded.config.tie_word_embeddings is False


def test_the_bias_of_a_decoder_apart_is_the_one_that_transformers_adds(tmp_path, trained):
    model = build(BertForMaskedLM, tie_word_embeddings=False)
    state = hf_state(model)
    state["cls.predictions.bias"] = torch.zeros(41)
    loaded = BertForMaskedLM.from_pretrained(write(tmp_path, state, config_file(tie_word_embeddings=False)))
    assert equal(loaded, model) and loaded.mlm.decoder.bias.abs().sum() > 0
    state = hf_state(trained) | {"cls.predictions.decoder.bias": torch.zeros(41)}
    refused(
        lambda: BertForMaskedLM.from_pretrained(write(tmp_path, state)),
        "conflicting cls.predictions.decoder.bias: cls.predictions.bias differs",
    )


def test_an_untied_decoder_that_is_not_stored_is_missing(tmp_path, trained):
    write(tmp_path, hf_state(trained), config_file(tie_word_embeddings=False))
    refused(lambda: BertForMaskedLM.from_pretrained(tmp_path), "missing cls.predictions.decoder.weight")


def test_projections_whose_shapes_only_add_up_are_refused(tmp_path, trained):
    state, name = hf_state(trained), "bert.encoder.layer.0.attention.self.{}.weight"
    query, key = state[name.format("query")], state[name.format("key")]
    state[name.format("query")], state[name.format("key")] = query[:-3].clone(), torch.cat([key, query[-3:]])
    write(tmp_path, state)
    refused(lambda: BertForMaskedLM.from_pretrained(tmp_path), "mis-shaped " + name.format("query"))


def test_heads_that_have_to_be_new_are_named(tmp_path, trained):
    state = {name: value for name, value in hf_state(trained).items() if "pooler" not in name}
    write(tmp_path, state)
    bare = BertModel.from_pretrained(tmp_path)
    assert bare.pooler is None and bare.new_parameters == ()
    classifier = BertForSequenceClassification.from_pretrained(tmp_path)
    assert set(classifier.new_parameters) == {
        "bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"
    }  # fmt: skip
    assert BertForMaskedLM.from_pretrained(tmp_path).new_parameters == ()
    refused(lambda: load_into(classifier, tmp_path), "missing bert.pooler.dense.weight", "classifier.bias")


def test_half_a_head_is_missing_not_new(tmp_path, trained):
    state = hf_state(trained)
    del state["cls.seq_relationship.bias"]
    refused(
        lambda: BertForPreTraining.from_pretrained(write(tmp_path, state)),
        f"{tmp_path}: missing cls.seq_relationship.bias",
    )


def test_every_key_that_does_not_fit_is_listed(tmp_path, trained):
    state = hf_state(trained)
    del state["bert.encoder.layer.0.attention.self.key.bias"]
    del state["bert.embeddings.LayerNorm.weight"]
    state["bert.encoder.layer.1.output.dense.weight"] = torch.zeros(24, 36)
    state["bert.encoder.layer.2.output.dense.weight"] = torch.zeros(24, 37)
    state["extra"] = torch.zeros(1)
    state["cls.predictions.extra"] = torch.zeros(1)
    message = refused(lambda: BertForPreTraining.from_pretrained(write(tmp_path, state)), str(tmp_path))
    assert sorted(message.removeprefix(f"{tmp_path}: ").split("; ")) == [
        "mis-shaped bert.encoder.layer.1.output.dense.weight: [24, 36], expected [24, 37]",
        "missing bert.embeddings.LayerNorm.weight",
        "missing bert.encoder.layer.0.attention.self.key.bias",
        "unexpected bert.encoder.layer.2.output.dense.weight",
        "unexpected cls.predictions.extra",
        "unexpected extra",
    ]


def test_conflicting_bad_and_whole_number_tensors_are_listed(tmp_path, trained):
    state = hf_state(trained)
    state["embeddings.LayerNorm.bias"] = state["bert.embeddings.LayerNorm.bias"] + 1
    state["bert.embeddings.LayerNorm.gamma"] = state["bert.embeddings.LayerNorm.weight"].clone()  # the same: fine
    state["bert.pooler.dense.bias"] = torch.full((24,), float("nan"))
    state["bert.pooler.dense.weight"] = torch.full((24, 24), float("-inf"))
    state["cls.seq_relationship.bias"] = torch.ones(2, dtype=torch.int64)
    message = refused(lambda: BertModel.from_pretrained(write(tmp_path, state)))
    problems = message.removeprefix(f"{tmp_path}: ").split("; ")
    assert len(problems) == 4
    assert any(p.startswith("conflicting") and "bert.embeddings.LayerNorm.bias" in p for p in problems)
    assert {"not finite bert.pooler.dense.bias", "not finite bert.pooler.dense.weight"} <= set(problems)
    assert "not floating point cls.seq_relationship.bias" in problems


def test_heads_that_a_model_lacks_are_left_unread(tmp_path, trained):
    state = hf_state(trained) | {"qa_outputs.weight": torch.zeros(2, 24), "classifier.bias": torch.zeros(9)}
    assert equal(BertModel.from_pretrained(write(tmp_path, state)), trained.bert)


def test_another_number_of_labels_makes_the_classifier_new(tmp_path):
    model = build(BertForSequenceClassification, id2label=("a", "b", "c"))
    model.save_pretrained(tmp_path)
    load = BertForSequenceClassification.from_pretrained
    five = load(tmp_path, num_labels=5)
    assert five.config.id2label == tuple(f"LABEL_{i}" for i in range(5))
    assert five.new_parameters == ("classifier.weight", "classifier.bias") and five.classifier.weight.shape == (5, 24)
    assert equal(five.bert, model.bert)
    assert load(tmp_path, id2label=("x", "y")).new_parameters == five.new_parameters
    same = load(tmp_path, id2label=("x", "y", "z"))
    assert same.new_parameters == () and equal(same, model) and same.config.id2label == ("x", "y", "z")
    assert load(tmp_path).config.id2label == ("a", "b", "c")
    refused(lambda: load(tmp_path, num_label=5), "unknown config key 'num_label'")


def test_every_model_says_which_heads_make_it():
    assert set(ARCHITECTURES) == set(MODELS)
    for name, kind in MODELS.items():
        stored = hf_state(build(kind))
        assert all(any(key.startswith(head) for key in stored) for head in ARCHITECTURES[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_says_which_class_it_is(tmp_path, kind):
    build(kind).save_pretrained(tmp_path)
    expected = "BertModel" if kind is BertForSentenceEmbedding else kind.objective
    assert architecture(tmp_path) == expected


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (["BertForTokenClassification"], "BertForTokenClassification"),
        (["Other", "BertForMultipleChoice"], "BertForMultipleChoice"),
        (["BertForQuestionAnswering"], "BertForSequenceClassification"),  # its head is not stored
        (["BertForJointClassification"], "BertForSequenceClassification"),  # the half of it
        (["BertModel"], "BertModel"),
        (["Other"], "BertForSequenceClassification"),
        ([["BertModel"], 3], "BertForSequenceClassification"),
        ("BertModel", "BertForSequenceClassification"),
        (None, "BertForSequenceClassification"),
    ],
)
def test_a_class_is_believed_where_its_heads_are_stored(tmp_path, says, expected):
    state = hf_state(build(BertForSequenceClassification))
    write(tmp_path, state, config_file(architectures=says))
    assert architecture(tmp_path) == expected


def test_the_class_is_found_without_reading_the_weights(saved, sharded):
    (saved / "manifest.json").unlink()
    whole = set(load_state(saved))
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[-8:] = b"\xff" * 8  # not a number, which loading refuses
    (saved / WEIGHTS).write_bytes(content)
    refused(lambda: BertForPreTraining.from_pretrained(saved), "not finite")
    assert set(stored_names(saved)) == whole and architecture(saved) == "BertForPreTraining"
    (sharded / "b.safetensors").unlink()
    assert set(stored_names(sharded)) == whole and architecture(sharded) == "BertForPreTraining"
    (saved / WEIGHTS).write_bytes(content[:100])
    refused(lambda: architecture(saved), WEIGHTS, "damaged or not a safetensors file")


def test_the_head_of_another_task_is_new_even_where_it_would_fit(tmp_path):
    model = build(BertForTokenClassification, id2label=("a", "b", "c"))
    model.save_pretrained(tmp_path)
    for kind in (BertForSequenceClassification, BertForJointClassification):
        loaded = kind.from_pretrained(tmp_path, task_specific_params={"intents": ["x", "y"]})
        assert {"classifier.weight", "classifier.bias"} <= set(loaded.new_parameters)
        assert loaded.classifier.weight.shape == model.classifier.weight.shape
        assert not torch.equal(loaded.classifier.weight, model.classifier.weight)
        assert equal(loaded.bert.encoder, model.bert.encoder)
        refused(lambda loaded=loaded: load_into(loaded, tmp_path), "classifier.weight")
    write(tmp_path / "unsaid", hf_state(model), config_file(num_labels=3))
    assert BertForTokenClassification.from_pretrained(tmp_path / "unsaid").new_parameters == ()


def test_other_intents_make_their_classifier_new(tmp_path):
    model = build(BertForJointClassification)
    model.save_pretrained(tmp_path)
    load = BertForJointClassification.from_pretrained
    two = load(tmp_path, task_specific_params={"intents": ["x", "y"]})
    assert two.new_parameters == ("intent_classifier.weight", "intent_classifier.bias")
    assert torch.equal(two.classifier.weight, model.classifier.weight)
    refused(lambda: load(tmp_path, task_specific_params={}), "task_specific_params['intents']=None is not a list of")


def test_the_task_is_kept_in_the_config_and_silence_writes_nothing(tmp_path):
    params = {"intents": ["x", "y"], "thresholds": [0.5, 0.25], "deep": {"null": None}}
    build(BertModel, finetuning_task="joint", task_specific_params=params).save_pretrained(tmp_path / "told")
    raw = json.loads((tmp_path / "told" / "config.json").read_text())
    assert raw["finetuning_task"] == "joint" and raw["task_specific_params"] == params
    config = load_config(tmp_path / "told")
    assert config.finetuning_task == "joint" and config.task_specific_params == params
    build(BertModel).save_pretrained(tmp_path / "silent")
    assert not {"finetuning_task", "task_specific_params"} & set(
        json.loads((tmp_path / "silent" / "config.json").read_text())
    )


def test_an_embedding_is_saved_as_an_encoder_and_read_from_one(tmp_path, trained):
    model = build(BertForSentenceEmbedding, task_specific_params={"pooling": "cls"})
    model.save_pretrained(tmp_path / "ours")
    encoder = BertModel.from_pretrained(tmp_path / "ours")
    assert encoder.pooler is None and equal(encoder, model)
    assert BertForSentenceEmbedding.from_pretrained(tmp_path / "ours").pooling == "cls"
    trained.save_pretrained(tmp_path / "pretrained")
    loaded = BertForSentenceEmbedding.from_pretrained(tmp_path / "pretrained")
    assert loaded.new_parameters == () and equal(loaded.encoder, trained.bert.encoder)


def test_config_changes_reach_the_model(saved):
    model = BertModel.from_pretrained(saved, hidden_dropout_prob=0.0, backend="reference")
    assert model.config.hidden_dropout_prob == 0.0 and model.backend == "reference"
    refused(lambda: BertModel.from_pretrained(saved, hiden_dropout_prob=0.0), "did you mean 'hidden_dropout_prob'?")


def test_a_config_without_model_type_is_berts(tmp_path, trained):
    config = config_file()
    del config["model_type"]
    assert equal(BertForPreTraining.from_pretrained(write(tmp_path, hf_state(trained), config)), trained)


@pytest.mark.parametrize("theirs", ["gelu_new", "gelu_pytorch_tanh", "gelu_tanh"])
def test_every_name_of_the_tanh_gelu_is_known(tmp_path, theirs):
    (tmp_path / "config.json").write_text(json.dumps(config_file(hidden_act=theirs)))
    assert load_config(tmp_path).hidden_act == "gelu_tanh"


def test_labels_of_a_config_keep_their_order(tmp_path):
    names = {str(i): f"name {i}" for i in (10, 2, 0, 1, 3, 4, 5, 6, 7, 8, 9)}
    (tmp_path / "config.json").write_text(json.dumps(config_file(id2label=names) | {"id2label": names}))
    assert load_config(tmp_path).id2label == tuple(f"name {i}" for i in range(11))
    (tmp_path / "config.json").write_text(json.dumps(config_file() | {"num_labels": 3, "pad_token_id": None}))
    assert load_config(tmp_path).id2label == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert load_config(tmp_path).pad_token_id == BertConfig().pad_token_id


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (config_file(model_type="roberta"), "model_type='roberta' is not bert"),
        (
            config_file(position_embedding_type="relative_key"),
            "position_embedding_type='relative_key' is not supported",
        ),
        (config_file(is_decoder=True, add_cross_attention=True), "add_cross_attention=true is not supported"),
        (config_file(hidden_act="relu"), "hidden_act='relu' is not one of gelu, gelu_new"),
        (config_file(hidden_size=770, num_attention_heads=12), "hidden_size=770 is not divisible"),
        (config_file(hidden_size="24"), "hidden_size='24' is not a positive whole number"),
        ({"model_type": "bert"}, "hidden_size or num_hidden_layers is missing: not a BERT configuration"),
        (config_file() | {"id2label": {"1": "a", "2": "b"}}, "id2label has the keys 1, 2: expected 0 to 1"),
        (config_file() | {"id2label": {"x": "a"}}, "config.json"),
        (config_file() | {"id2label": "ab"}, "id2label='ab' is not a list of distinct names"),
        (config_file() | {"num_labels": "3"}, "config.json"),
        (config_file(hidden_act=["gelu"]), "config.json"),
        ([1], "expected a JSON object, got list"),
        ('{"hidden_size": ', "broken JSON"),
        ("", "broken JSON"),
        ("[" * 100_000, "broken JSON"),
        (b"\xff\xfe{}", "broken JSON"),
    ],
)
def test_a_config_that_cannot_be_is_one_clear_line(tmp_path, content, message):
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: BertModel.from_pretrained(tmp_path), f"{tmp_path / 'config.json'}: ", message)


def test_a_directory_without_checkpoint_is_named(tmp_path, saved):
    refused(lambda: BertModel.from_pretrained(tmp_path), f"{tmp_path} is not a checkpoint: it has no config.json")
    missing = tmp_path / "missing"
    refused(lambda: BertModel.from_pretrained(missing), f"{missing} is not a checkpoint: it has no config.json")
    refused(lambda: BertModel.from_pretrained(saved / "config.json"), "is not a checkpoint")
    (saved / "manifest.json").unlink()
    (saved / WEIGHTS).unlink()
    refused(lambda: BertModel.from_pretrained(saved), f"{saved} is not a checkpoint: it has no {WEIGHTS}")


@pytest.fixture
def sharded(tmp_path, trained):
    state = {name: value.clone() for name, value in hf_state(trained).items()}
    names = sorted(state)
    parts = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    write(tmp_path, {})
    (tmp_path / WEIGHTS).unlink()
    for file, members in parts.items():
        save_file({name: state[name] for name in members}, tmp_path / file)
    where = {name: file for file, members in parts.items() for name in members}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return tmp_path


def edit_index(directory, change):
    index = json.loads((directory / INDEX).read_text())
    change(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


def test_shards_load(sharded, trained):
    assert equal(BertForPreTraining.from_pretrained(sharded), trained)


@pytest.mark.parametrize(
    "hostile", ["../x.safetensors", "/etc/passwd", "link.safetensors", "sub/x.safetensors", "..", "", "a\nb", "a\0", 3]
)
def test_an_index_that_points_elsewhere_is_refused(sharded, tmp_path_factory, hostile):
    outside = tmp_path_factory.mktemp("outside") / "x.safetensors"
    os.replace(sharded / "b.safetensors", outside)
    (sharded / "sub").mkdir()
    for place in (sharded.parent / "x.safetensors", sharded / "sub" / "x.safetensors"):
        place.write_bytes(outside.read_bytes())
    (sharded / "link.safetensors").symlink_to(outside)
    edit_index(sharded, lambda where: where.update({k: hostile for k, v in where.items() if v == "b.safetensors"}))
    refused(lambda: load_state(sharded), str(sharded / INDEX))


def test_broken_shards_and_indices_are_one_clear_line(sharded):
    state = load_file(sharded / "b.safetensors")
    again = load_file(sharded / "a.safetensors")
    save_file(state | {min(again): again[min(again)]}, sharded / "b.safetensors")
    refused(lambda: load_state(sharded), "b.safetensors", min(again), "in another shard too")
    lost = min(state)
    save_file({name: value for name, value in state.items() if name != lost}, sharded / "b.safetensors")
    refused(lambda: load_state(sharded), INDEX, f"{lost} in no shard")
    (sharded / "b.safetensors").unlink()
    refused(lambda: load_state(sharded), INDEX, "'b.safetensors' is missing")
    for content in ("", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": "a", "y": 1}}', "[" * 100_000):
        (sharded / INDEX).write_text(content)
        refused(lambda: load_state(sharded), INDEX, "expected an object with a weight_map")


@pytest.mark.parametrize("length", [0, 5, 8, 100, 3000, -1])
def test_truncated_weights_are_refused(saved, length):
    content = (saved / WEIGHTS).read_bytes()[:length]
    (saved / WEIGHTS).write_bytes(content)
    refused(lambda: BertModel.from_pretrained(saved), WEIGHTS, "truncated")
    (saved / "manifest.json").unlink()
    refused(lambda: BertModel.from_pretrained(saved), WEIGHTS, "damaged or not a safetensors file")


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_bit_anywhere_is_seen(saved, seed):
    draw = random.Random(seed)
    content = bytearray((saved / WEIGHTS).read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    (saved / WEIGHTS).write_bytes(content)
    refused(lambda: BertModel.from_pretrained(saved), f"{saved / WEIGHTS}: its sha256 is not the one in manifest.json")


def test_a_mutated_header_gives_an_error_or_the_same_shapes(saved, trained):
    """Without a manifest a payload bit cannot be seen; a header that loads has to give the model it says."""
    (saved / "manifest.json").unlink()
    original = (saved / WEIGHTS).read_bytes()
    size = struct.unpack("<Q", original[:8])[0]
    draw, errors = random.Random(0), 0
    for _ in range(150):
        content = bytearray(original)
        for _ in range(draw.choice([1, 1, 2, 9])):
            content[draw.randrange(8 + size)] = draw.randrange(256)
        (saved / WEIGHTS).write_bytes(content)
        try:
            model = BertForPreTraining.from_pretrained(saved)
        except ValueError as error:
            errors += 1
            assert len(str(error).splitlines()) == 1 and str(saved) in str(error)
        else:
            assert [p.shape for p in model.parameters()] == [p.shape for p in trained.parameters()]
    assert errors > 100


@pytest.mark.parametrize(
    "header",
    [
        {"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**60]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"x": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"x": {"dtype": "F32"}},
        {"x": 3},
        [],
    ],
)
def test_a_hostile_header_is_refused(tmp_path, header):
    write(tmp_path, {})
    text = json.dumps(header).encode()
    (tmp_path / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    refused(lambda: load_state(tmp_path), WEIGHTS)


@pytest.fixture
def pickled(tmp_path, trained):
    write(tmp_path, {})
    (tmp_path / WEIGHTS).unlink()
    torch.save(hf_state(trained), tmp_path / "pytorch_model.bin")
    return tmp_path


def test_a_pickle_is_read_only_when_asked(pickled, trained):
    refused(lambda: BertForPreTraining.from_pretrained(pickled), "pass allow_pickle=True (--allow-pickle) to read it")
    assert equal(BertForPreTraining.from_pretrained(pickled, allow_pickle=True), trained)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_hostile_pickle_executes_nothing(pickled, tmp_path):
    mark = tmp_path / "executed"
    for content in (Hostile(mark), {"bert.pooler.dense.bias": Hostile(mark)}):
        torch.save(content, pickled / "pytorch_model.bin")
        refused(lambda: load_state(pickled, allow_pickle=True), "not a readable pickle of tensors")
        (pickled / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
        refused(lambda: load_state(pickled, allow_pickle=True), "pytorch_model.bin")
        assert not mark.exists()
    pickle.loads(pickle.dumps(Hostile(mark)))
    assert mark.exists(), "the trap itself works"


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {3: torch.ones(2)}, torch.ones(2), {"a": {"b": torch.ones(2)}}])
def test_a_pickle_of_something_else_is_refused(pickled, content):
    torch.save(content, pickled / "pytorch_model.bin")
    refused(lambda: load_state(pickled, allow_pickle=True), "expected a dictionary of tensors")
    (pickled / "pytorch_model.bin").write_bytes((pickled / "pytorch_model.bin").read_bytes()[:50])
    refused(lambda: load_state(pickled, allow_pickle=True), "not a readable pickle of tensors")


@pytest.mark.parametrize(
    "value",
    [torch.ones(1).expand(2**38), torch.eye(3).to_sparse(), torch.ones(3, device="meta")],
    ids=["a terabyte in four bytes", "sparse", "without values"],
)
def test_a_pickled_tensor_without_its_bytes_is_refused(pickled, value):
    torch.save({"x": value}, pickled / "pytorch_model.bin")
    refused(lambda: load_state(pickled, allow_pickle=True), "'x' is not dense, or larger than what is stored of it")


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_save_leaves_every_old_file_whole(saved, monkeypatch, after):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    replace, calls = os.replace, []

    def interrupt(source, target):
        calls.append(target)
        if len(calls) > after:
            raise KeyboardInterrupt
        replace(source, target)

    other = build(BertForPreTraining, seed=9)
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        other.save_pretrained(saved)
    monkeypatch.undo()
    names = ["config.json", WEIGHTS, "manifest.json"]
    assert {path.name for path in saved.iterdir()} == set(names)
    assert all((saved / name).read_bytes() == before[name] for name in names[after:])
    if after == 2:  # new weights under the old manifest: seen, not loaded
        refused(lambda: BertForPreTraining.from_pretrained(saved), WEIGHTS, "manifest.json")
    other.save_pretrained(saved)
    assert equal(BertForPreTraining.from_pretrained(saved), other)


def test_files_of_the_user_are_not_part_of_the_manifest(tmp_path, trained):
    (tmp_path / "notes.md").write_text("first")
    trained.save_pretrained(tmp_path)
    (tmp_path / "notes.md").write_text("second")
    assert equal(BertForPreTraining.from_pretrained(tmp_path), trained)


def test_saving_over_an_old_checkpoint_replaces_it(saved):
    other = build(BertForPreTraining, seed=9, ffn="geglu")
    other.save_pretrained(saved)
    assert equal(BertForPreTraining.from_pretrained(saved), other)
