"""What `finetune` may do beside learning: draw some weights anew."""

import copy

import pytest
import torch
from small import build

from minibert.model import BertForSequenceClassification, BertForTokenClassification
from minibert.tasks.finetune import reinitialise


@pytest.mark.parametrize("kind", [BertForSequenceClassification, BertForTokenClassification])
def test_the_last_layers_and_the_pooler_are_drawn_anew_and_nothing_else(kind):
    model = build(kind, num_hidden_layers=3)
    before = copy.deepcopy(model.state_dict())
    reinitialise(model, 2, seed=5)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    above = ("bert.encoder.layers.1.", "bert.encoder.layers.2.", "bert.pooler.")
    matrices_and_biases = {name for name in before if name.startswith(above) and "norm.weight" not in name}
    assert changed == matrices_and_biases, "the weights of norms were 1 and are 1"
    again = copy.deepcopy(model.state_dict())
    reinitialise(model, 2, seed=5)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    reinitialise(model, 0, seed=6)
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("layers", [-1, 3, 1.0])
def test_a_number_of_layers_that_there_is_not_is_refused(layers):
    with pytest.raises(ValueError, match=f"reinit_layers={layers} is not a whole number from 0 to 2"):
        reinitialise(build(BertForSequenceClassification), layers, seed=0)
