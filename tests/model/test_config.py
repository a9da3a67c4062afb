"""The config refuses what no model can be, in one line that names field and value."""

import dataclasses
from typing import get_args

import pytest
import torch
from small import SIZES, build, packed, padded, small_config

from minibert import config as config_module
from minibert.config import PRESETS, BertConfig, one_of, refuse_unknown
from minibert.model import BLOCKS, FFNS, NORMS, POSITIONS, BertModel
from minibert.model.ffn import APPROXIMATE

COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, -3, 2.0, "7", True, None])
def test_a_size_has_to_be_a_positive_whole_number(field, value):
    with pytest.raises(ValueError) as error:
        BertConfig(**{field: value})
    assert str(error.value) == f"{field}={value!r} is not a positive whole number"


@pytest.mark.parametrize("field", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
@pytest.mark.parametrize("value", [1.0, -0.1, "0.1", float("nan"), True])
def test_a_dropout_has_to_be_a_probability_below_one(field, value):
    with pytest.raises(ValueError) as error:
        BertConfig(**{field: value})
    assert str(error.value) == f"{field}={value!r} is not in [0, 1)"


def test_only_the_classifier_dropout_may_be_none():
    assert BertConfig(classifier_dropout=None).classifier_dropout is None
    with pytest.raises(ValueError, match="hidden_dropout_prob=None is not in"):
        BertConfig(hidden_dropout_prob=None)


@pytest.mark.parametrize("field", ["layer_norm_eps", "initializer_range"])
@pytest.mark.parametrize("value", [0, -1e-12, "1e-12", float("nan"), None])
def test_an_epsilon_has_to_be_a_positive_number(field, value):
    with pytest.raises(ValueError) as error:
        BertConfig(**{field: value})
    assert str(error.value) == f"{field}={value!r} is not a positive number"


def test_heads_have_to_divide_the_width():
    with pytest.raises(ValueError) as error:
        BertConfig(hidden_size=770)
    assert str(error.value) == "hidden_size=770 is not divisible by num_attention_heads=12"


@pytest.mark.parametrize("value", [-1, 30522, 0.0, None, False])
def test_the_pad_token_has_to_be_in_the_vocabulary(value):
    with pytest.raises(ValueError) as error:
        BertConfig(pad_token_id=value)
    assert str(error.value) == f"pad_token_id={value!r} is not in [0, vocab_size=30522)"


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_tying_is_true_or_false(value):
    with pytest.raises(ValueError) as error:
        BertConfig(tie_word_embeddings=value)
    assert str(error.value) == f"tie_word_embeddings={value!r} is not true or false"


def test_an_unknown_activation_gets_the_nearest_name():
    with pytest.raises(ValueError) as error:
        BertConfig(hidden_act="gelu_tan")
    assert str(error.value) == "hidden_act='gelu_tan' is not one of gelu, gelu_tanh: did you mean 'gelu_tanh'?"


def test_an_unknown_problem_type_gets_the_nearest_name():
    with pytest.raises(ValueError, match="problem_type='regresion' is not one of .*: did you mean 'regression'"):
        BertConfig(problem_type="regresion")


@pytest.mark.parametrize("value", [(), ("a", "a"), (0, 1), "ab", {"0": "a"}, 3, [["a"], ["b"]]])
def test_labels_have_to_be_a_list_of_distinct_names(value):
    with pytest.raises(ValueError) as error:
        BertConfig(id2label=value)
    assert str(error.value) == f"id2label={value!r} is not a list of distinct names"


@pytest.mark.parametrize("slot", ["norm", "ffn", "position", "block"])
@pytest.mark.parametrize("value", ["batchnorm", 3, ["layernorm"]])
def test_a_part_that_no_table_has_is_refused_when_it_is_built(slot, value):
    with pytest.raises(ValueError) as error:
        BertModel(small_config(**{slot: value}))
    assert str(error.value).startswith(f"{slot}={value!r} is not one of ")
    assert "\n" not in str(error.value)


def test_the_words_of_the_config_are_the_keys_of_the_tables():
    words = {config_module.Norm: NORMS, config_module.Ffn: FFNS, config_module.Position: POSITIONS}
    for literal, table in (words | {config_module.Block: BLOCKS, config_module.Activation: APPROXIMATE}).items():
        assert get_args(literal) == tuple(table)


def test_a_norm_of_ones_own_needs_nothing_but_a_line_in_the_table(monkeypatch):
    class Mine(torch.nn.Module):
        def __init__(self, config, site=None):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(config.hidden_size))

        def forward(self, x, ctx, residual=None):
            return (x + residual).tanh() * self.weight

    monkeypatch.setitem(NORMS, "mine", Mine)
    model = build(BertModel, norm="mine")
    output = model(packed(padded()))
    output.last_hidden_state.sum().backward()
    assert isinstance(model.encoder.layers[1].ffn_norm, Mine)
    assert output.last_hidden_state.abs().max() <= 1
    assert model.encoder.layers[0].attention_norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_heads_of_64(name):
    config = BertConfig.preset(name, vocab_size=101)
    assert config.head_size == 64 and config.vocab_size == 101
    assert config.intermediate_size == 4 * config.hidden_size


def test_the_presets_have_the_sizes_that_were_published():
    sizes = {name: (c["num_hidden_layers"], c["hidden_size"]) for name, c in PRESETS.items()}
    assert sizes == {
        "bert-tiny": (2, 128), "bert-mini": (4, 256), "bert-small": (4, 512), "bert-base": (12, 768),
        "bert-large": (24, 1024),
    }  # fmt: skip


def test_an_unknown_preset_gets_the_nearest_name():
    with pytest.raises(ValueError, match=r"model='bert-bsae' is not one of .*: did you mean 'bert-base'\?"):
        BertConfig.preset("bert-bsae")


def test_an_unknown_key_gets_the_nearest_name():
    with pytest.raises(ValueError) as error:
        BertConfig().replace(hiden_size=32)
    assert str(error.value) == "unknown config key 'hiden_size': did you mean 'hidden_size'?"
    with pytest.raises(ValueError, match="unknown config key 'num_heads'"):
        BertConfig.preset("bert-tiny", num_heads=2)


def test_an_unknown_key_with_nothing_near_gets_the_list():
    with pytest.raises(ValueError, match="unknown run key 'zzz': known are vocab_size, hidden_size, "):
        refuse_unknown({"zzz": 1}, BertConfig, "run")


def test_a_name_with_nothing_near_gets_no_hint():
    with pytest.raises(ValueError) as error:
        one_of("kind", "zzz", {"one": 1, "two": 2})
    assert str(error.value) == "kind='zzz' is not one of one, two"


def test_a_replaced_config_is_checked_again_and_the_old_one_stays():
    config = BertConfig(**SIZES)
    assert config.replace(hidden_size=27).head_size == 9 and config.head_size == 8
    with pytest.raises(ValueError, match="hidden_size=25 is not divisible by num_attention_heads=3"):
        config.replace(hidden_size=25)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 27


def test_a_config_survives_its_own_dictionary():
    config = small_config(id2label=["bad", "good", "odd"], norm="rmsnorm", tie_word_embeddings=False)
    assert BertConfig(**config.to_dict()) == config
    assert config.num_labels == 3 and config.label2id == {"bad": 0, "good": 1, "odd": 2}
    assert isinstance(config.to_dict()["id2label"], list)


@pytest.mark.parametrize("value", ["", 3, ["ner"]])
def test_a_task_has_a_name(value):
    with pytest.raises(ValueError) as error:
        BertConfig(finetuning_task=value)
    assert str(error.value) == f"finetuning_task={value!r} is not a name"


@pytest.mark.parametrize("value", [[1], "intents", 3, {"a": float("nan")}, {"a": {1, 2}}, {("a", "b"): 1}])
def test_what_a_task_keeps_has_to_be_an_object_of_json(value):
    with pytest.raises(ValueError, match="task_specific_params") as error:
        BertConfig(task_specific_params=value)
    assert "\n" not in str(error.value)


def test_what_a_task_keeps_is_a_copy_as_a_file_gives_it_back():
    given = {"intents": ("ask", "tell"), "threshold": 0.25}
    config = BertConfig(finetuning_task="joint", task_specific_params=given)
    given["threshold"] = 1
    assert config.task_specific_params == {"intents": ["ask", "tell"], "threshold": 0.25}
    assert config == config.replace(classifier_dropout=None) and hash(config) == hash(config.replace())
    assert BertConfig().finetuning_task is None and BertConfig().task_specific_params is None
