"""What minibert is compared with, each with its usual calls: transformers, ONNX Runtime, sentence-transformers.

An encoder is `prepare(sequences, types)`, outside the clock; `run(inputs)`, what is timed; `states(output, inputs)`,
the last hidden states of the real tokens, [T, D], for the gate. `types` are token_type_ids, or None for zeros.
"""

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minibert import BertForPreTraining, BertModel, Tokenizer
from minibert.batch import IGNORE, Batch, pack
from minibert.config import BertConfig
from minibert.hub import BIAS, DECODER_BIAS, hf_names
from minibert.model import Output
from minibert.model.graphs import GraphPool

from .gate import Refused


@dataclass(frozen=True)
class Encoder:
    """See the module."""

    prepare: Callable[..., Any]
    run: Callable[[Any], Any]
    states: Callable[[Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how an encoder runs."""

    weights: Path
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    threads: int = 1
    backend: str = "auto"  # minibert's


def random_weights(config: BertConfig, folder: Path, kind: type = BertModel) -> Path:
    """A checkpoint in which every parameter matters: fresh models have zero biases, which nobody would miss, and
    weights so small, half of a trained BERT's, that GELU is almost linear."""
    torch.manual_seed(0)
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
    model.save_pretrained(folder, whole_words(config.vocab_size))
    return folder


def minibert_model(place: Place) -> BertModel:
    return owned(BertModel.from_pretrained(place.weights, backend=place.backend)).to(place.device, place.dtype).eval()


def owned(model: nn.Module) -> nn.Module:
    """With weights in memory of their own: those mapped from a file may be put out while others run."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


def compiled_call(call: Callable, **options: Any) -> Callable:
    """`call` under torch.compile with these options; as it is without any.

    Beyond its limit of recompilations torch would run the rest eagerly, and the row would be of something else: the
    limit is higher here, and reaching it is an error.
    """
    if not options:
        return call
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True
    return torch.compile(call, **options)


def minibert(place: Place, **compiled: Any) -> Encoder:
    """Packed batches, as the tokenizer's lists are packed; `compiled` are options of torch.compile."""
    model = minibert_model(place)
    run = compiled_call(model, **compiled)
    return Encoder(
        lambda ids, types=None: pack(ids, types).to(place.device), run, lambda output, batch: output.last_hidden_state
    )


def minibert_graphs(place: Place) -> Encoder:
    """Batches of any size from CUDA graphs, with padding, the copy to the GPU and that of the output."""
    pool = GraphPool(minibert_model(place), max_tokens=1 << 20)

    def prepare(ids, types=None):
        batch = pack(ids, types)
        pool.prepare([batch])
        return batch

    return Encoder(prepare, pool, lambda output, batch: output.last_hidden_state)


def minibert_padded(place: Place) -> Encoder:
    """The drop-in call: Hugging Face's layout in and out, packed and unpacked inside the clock."""
    model = minibert_model(place)
    return Encoder(partial(padded, device=place.device), lambda batch: model(**batch), masked_states)


def transformers(place: Place, attention: str = "sdpa", **compiled: Any) -> Encoder:
    """transformers' BertModel, batches padded to their longest; `compiled` are options of torch.compile."""
    model = hf_model("BertModel", place, attention, add_pooling_layer=True).eval()
    run = compiled_call(model, **compiled)
    return Encoder(partial(padded, device=place.device), lambda batch: run(**batch), masked_states)


def hf_model(name: str, place: Place, attention: str, dropout: float = 0.0, **options: Any) -> nn.Module:
    """A transformers model of these weights; its config is its own, two models must not share one."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    config = copy.deepcopy(hf.BertConfig.from_pretrained(place.weights))
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    model = getattr(hf, name).from_pretrained(
        place.weights,
        config=config,
        local_files_only=True,
        attn_implementation=attention,
        dtype=torch.float32,
        **options,
    )
    return owned(model).to(place.device, place.dtype)


def onnx_runtime(place: Place) -> Encoder:
    """ONNX Runtime's CPU provider on the exported transformers model, all graph optimisations on."""
    import onnxruntime

    if place.device != "cpu" or place.dtype != torch.float32:
        raise Refused(f"onnxruntime: its CPU provider has no {str(place.dtype).removeprefix('torch.')} BERT")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = place.threads, 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        file = export_onnx(place, Path(folder) / "model.onnx")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = {node.name for node in session.get_inputs()}

    def run(batch):
        return session.run(None, {name: value.numpy() for name, value in batch.items() if name in names})

    return Encoder(
        partial(padded, device="cpu"), run,
        lambda output, batch: torch.from_numpy(output[0])[batch["attention_mask"].bool()],
    )  # fmt: skip


def export_onnx(place: Place, file: Path) -> Path:
    """transformers' encoder as ONNX with free batch and length, which the session fuses as it can."""
    import onnx  # noqa: F401  (the exporter's error would not name what is missing)

    model = hf_model("BertModel", place, "eager").eval()
    example = padded([np.arange(1, 8), np.arange(1, 5)], device="cpu")
    axes = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("length", min=2, max=512)}
    names = ("input_ids", "attention_mask", "token_type_ids")

    class States(nn.Module):
        def forward(self, input_ids, attention_mask, token_type_ids):
            return self.model(input_ids, attention_mask, token_type_ids).last_hidden_state

    wrapper = States()
    wrapper.model = model
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            wrapper, tuple(example[name] for name in names), file, input_names=list(names), output_names=["states"],
            dynamic_shapes=[axes] * 3, dynamo=True, verbose=False,
        )  # fmt: skip
    return file


Embedder = Callable[[list[str]], Tensor]  # texts to the mean of their last hidden states, [B, D]


def whole_words(vocab_size: int) -> Tokenizer:
    """A vocabulary of whole words, so that a text has as many tokens as words, and two for [CLS] and [SEP]."""
    names = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(word(i) for i in range(5, vocab_size)))
    return Tokenizer.from_vocab({name: i for i, name in enumerate(names)})


def word(index: int) -> str:
    return f"w{index}"


def minibert_embedder(place: Place, batch_size: int) -> Embedder:
    """Tokenise, pack, average."""
    model, tokenizer = minibert_model(place), Tokenizer.from_pretrained(place.weights)

    def embed(texts):
        found = []
        for i in range(0, len(texts), batch_size):
            batch = pack(tokenizer(texts[i : i + batch_size], truncation=True).input_ids).to(place.device)
            states = model(batch).last_hidden_state.float()
            found.append(torch.segment_reduce(states, "mean", lengths=batch.cu_seqlens.diff().long()))
        return torch.cat(found)

    return embed


def sentence_transformers_embedder(place: Place, batch_size: int) -> Embedder:
    """Their `encode`, which sorts the texts by length."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    options = {"dtype": torch.float32, "local_files_only": True}
    encoder = Transformer(str(place.weights), model_kwargs=options, processor_kwargs={"local_files_only": True})
    owned(encoder)
    pooling = Pooling(encoder.get_embedding_dimension(), "mean")
    model = SentenceTransformer(modules=[encoder, pooling], device=place.device).to(place.dtype)
    return lambda texts: model.encode(
        texts, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True
    ).float()


def pair_types(sequences: list[np.ndarray]) -> list[np.ndarray]:
    """token_type_ids of sequences whose second half is another text, so that who ignores them is seen."""
    return [(np.arange(len(ids)) >= (len(ids) + 1) // 2).astype(np.int64) for ids in sequences]


def padded(sequences: list[np.ndarray], types: list[np.ndarray] | None = None, *, device: str) -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids, [B, longest] int64."""
    lengths = np.array([len(ids) for ids in sequences])
    mask = np.arange(lengths.max()) < lengths[:, None]
    rows = {"input_ids": sequences, "attention_mask": None, "token_type_ids": types}
    found = {}
    for name, values in rows.items():
        found[name] = np.zeros(mask.shape, dtype=np.int64)
        if name == "attention_mask":
            found[name][mask] = 1
        elif values is not None:
            found[name][mask] = np.concatenate(values)
    return {name: torch.from_numpy(array).to(device) for name, array in found.items()}


def padded_batch(batch: Batch, device: str) -> dict[str, Tensor]:
    """`padded` of a packed batch on the CPU."""
    parts = [[part.numpy() for part in x.split(batch.lengths)] for x in (batch.input_ids, batch.token_type_ids)]
    return padded(*parts, device=device)


def masked_states(output, batch) -> Tensor:
    return output.last_hidden_state[batch["attention_mask"].bool()]


@dataclass(frozen=True)
class Trainee:
    """A model that is pretrained: `prepare(batch)` outside the clock, `loss(inputs)`; `gradients()` under Hugging
    Face's names, once backward ran."""

    model: nn.Module
    prepare: Callable[[Batch], Any]
    loss: Callable[[Any], Tensor]
    gradients: Callable[[], dict[str, Tensor]]


def minibert_trainee(place: Place, dropout: float, **compiled: Any) -> Trainee:
    """Packed batches; only the masked tokens meet the vocabulary."""
    model = BertForPreTraining.from_pretrained(
        place.weights, backend=place.backend, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    model = owned(model).to(place.device).train()
    call = compiled_call(model, **compiled)

    def gradients():
        found = {}
        for name, parameter in model.named_parameters():
            names = hf_names(name)
            found |= dict(zip(names, parameter.grad.chunk(len(names)), strict=True))
        return found

    return Trainee(model, lambda batch: batch.to(place.device), lambda batch: call(batch, seed=1).loss, gradients)


def transformers_trainee(
    place: Place, dropout: float, attention: str = "sdpa", masked_rows: bool = False, **compiled: Any
) -> Trainee:
    """transformers' BertForPreTraining on padded batches, with the head on all tokens, or on the masked ones alone."""
    model = hf_model("BertForPreTraining", place, attention, dropout=dropout).train()

    def masked_loss(input_ids, attention_mask, token_type_ids, rows, targets, next_sentence_label):
        states, pooled = model.bert(input_ids, attention_mask, token_type_ids, return_dict=False)[:2]
        logits, pairs = model.cls(states.flatten(0, 1)[rows], pooled)
        cross_entropy = nn.functional.cross_entropy
        return cross_entropy(logits.float(), targets) + cross_entropy(pairs.float(), next_sentence_label)

    def full_loss(**batch):
        return model(**batch).loss

    call = masked_loss if masked_rows else full_loss
    call = compiled_call(call, **compiled)

    def prepare(batch: Batch):
        inputs = padded_batch(batch, place.device)
        labels = torch.full((batch.num_tokens,), IGNORE)
        labels[batch.mlm_rows] = batch.mlm_labels
        mask = inputs["attention_mask"].bool().cpu()
        full = torch.full(mask.shape, IGNORE)
        full[mask] = labels
        inputs["next_sentence_label"] = batch.nsp_labels.to(place.device)
        if masked_rows:
            rows = (full.flatten() != IGNORE).nonzero().squeeze(1)
            inputs |= {"rows": rows.to(place.device), "targets": full.flatten()[rows].to(place.device)}
        else:
            inputs["labels"] = full.to(place.device)
        return inputs

    def gradients():
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        if DECODER_BIAS in found:
            found[BIAS] = found.pop(DECODER_BIAS)
        return found

    return Trainee(model, prepare, lambda inputs: call(**inputs), gradients)


def hf_tokenizer(tokenizer, folder: Path):
    """The same vocabulary as transformers' fast tokenizer."""
    import transformers as hf

    tokenizer.save_pretrained(folder / "tokenizer")
    return hf.AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)


def hf_collator(tokenizer, folder: Path):
    """Dynamic masking and padding of a list of samples."""
    import transformers as hf

    return hf.DataCollatorForLanguageModeling(hf_tokenizer(tokenizer, folder), mlm_probability=0.15)


class TransformersTask(nn.Module):
    """transformers' BERT with the head of `ours`, a classifier or a joint one; packed batches in, packed logits out.

    transformers has no joint model: its BertModel gets the two linear layers and the dropout of one.
    """

    def __init__(self, weights: Path, ours: nn.Module):
        super().__init__()
        place, drop = Place(weights=weights), ours.config.hidden_dropout_prob
        self.config = ours.config  # what a task evaluates by
        self.joint = ours.objective == "BertForJointClassification"
        if not self.joint and ours.objective != "BertForSequenceClassification":
            raise Refused(f"transformers: no counterpart of {ours.objective} is written here")
        self.model = hf_model("BertModel" if self.joint else ours.objective, place, "sdpa", dropout=drop)
        if self.joint:
            self.intents, self.slots = copy.deepcopy(ours.intent_classifier), copy.deepcopy(ours.classifier)
            self.drop = nn.Dropout(drop)

    def forward(self, batch: Batch) -> Output:
        inputs = padded_batch(batch, "cpu")
        if not self.joint:
            return Output(logits=self.model(**inputs).logits)
        found = self.model(**inputs)
        states = masked_states(found, inputs)[batch.token_rows]
        return Output(
            logits=self.slots(self.drop(states)), sequence_logits=self.intents(self.drop(found.pooler_output))
        )

    def loss(self, batch: Batch) -> Tensor:
        output, cross_entropy = self(batch), nn.functional.cross_entropy
        if not self.joint:
            return cross_entropy(output.logits.float(), batch.labels)
        return cross_entropy(output.sequence_logits.float(), batch.labels) + cross_entropy(
            output.logits.float(), batch.token_labels
        )
