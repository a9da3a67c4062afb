"""What a language model is trained with: masked or next tokens, and pairs of sentences."""

import dataclasses
from collections.abc import Callable

from torch import Tensor, nn

from minibert_kernels import bias_gelu, linear_cross_entropy, select_rows

from ..batch import IGNORE, Batch
from ..config import BertConfig
from .context import Context, Output
from .encoder import Bert, BertModel, enter, initialise, leave
from .ffn import APPROXIMATE, activated
from .losses import check_classes, check_shape, cross_entropy
from .norm import NORMS

MASKED = 0.15  # share of the tokens that a masked language model predicts (Devlin et al., 2019)


class MLMHead(nn.Module):
    """norm(gelu(dense(x))), then a linear map to the vocabulary whose weight is usually the word embedding's."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.approximate = APPROXIMATE[config.hidden_act]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = NORMS["layernorm"](config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def transform(self, x: Tensor, ctx: Context) -> Tensor:
        return self.norm(activated(bias_gelu, self.dense, x, ctx, approximate=self.approximate), ctx)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """[N, D] to logits [N, V]."""
        return self.decoder(self.transform(x, ctx))

    def loss(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Mean loss and number correct over the labelled tokens of the batch; no other row meets the vocabulary."""
        rows, labels = ctx.batch.mlm_rows, ctx.batch.mlm_labels
        hidden = self.transform(select_rows(x, rows, backend=ctx.backend), ctx)
        return linear_cross_entropy(
            hidden, self.decoder.weight, self.decoder.bias, labels, max_labels=len(labels), backend=ctx.backend
        )


def example_mlm_targets(config: BertConfig, lengths: Tensor, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Targets of a masked language model, at a share of all tokens."""
    tokens = int(lengths.sum())
    rows = draw(2**62, tokens).argsort()[: max(1, round(MASKED * tokens))].sort().values
    return {"mlm_rows": rows, "mlm_labels": draw(config.vocab_size, len(rows))}


class Headed(Bert):
    """An encoder with heads; subclasses build the heads and say what a packed batch gives."""

    def __init__(self, config: BertConfig, *, add_pooler: bool, backend: str):
        super().__init__()
        if config.causal and add_pooler:
            raise ValueError(
                f"causal=True: {self.objective} reads [CLS], which sees no other token: use a BertForMaskedLM"
            )
        self.config, self.backend = config, backend
        self.bert = BertModel(config, add_pooler=add_pooler, backend=backend)

    def tie(self) -> None:
        """Share the word embedding with the decoder, when the config says so."""
        if self.config.tie_word_embeddings:
            self.mlm.decoder.weight = self.bert.embeddings.word.weight

    def encode(self, batch: Batch, seed, **wanted) -> tuple[Context, Output]:
        ctx = self.context(batch, seed)
        return ctx, self.bert.encode(ctx, **wanted)


class BertForPreTraining(Headed):
    """Masked language model and next-sentence prediction (Devlin et al., 2019, section 3.1).

    `loss` is the sum of the two means. The next sentence's head learns a batch's `sop_labels`, too. Logits over all
    tokens and the whole vocabulary are made for the Hugging Face call, as there, and for a packed batch without labels;
    `output_logits` says otherwise. Without them, only labelled tokens meet the vocabulary.
    """

    objective = "BertForPreTraining"

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return example_mlm_targets(config, lengths, draw) | {"nsp_labels": draw(2, len(lengths))}

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=True, backend=backend)
        self.mlm = MLMHead(config)
        self.nsp = nn.Linear(config.hidden_size, 2)
        initialise(self.mlm, config)
        initialise(self.nsp, config)
        self.tie()

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
        next_sentence_label=None, *, seed=None, output_logits: bool | None = None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: [B, S], -100 where there is nothing to predict; next_sentence_label: [B], 0 follows, 1 random."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        batch = with_mlm_labels(batch, mask, labels, self.config)
        if next_sentence_label is not None:
            batch = dataclasses.replace(batch, nsp_labels=next_sentence_label.view(-1))
        ctx, encoded = self.encode(batch, seed, **wanted)
        x, batch = encoded.last_hidden_state, ctx.batch
        output = Output(hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        output.seq_relationship_logits = self.nsp(encoded.pooler_output)
        losses = []
        if batch.mlm_rows is not None:
            loss, correct = self.mlm.loss(x, ctx)
            losses.append(record(output, "mlm", loss, correct, len(batch.mlm_rows)))
        for name, labels in (("nsp", batch.nsp_labels), ("sop", batch.sop_labels)):
            if labels is not None:
                losses.append(score_pairs(output, name, labels))
        if losses:
            output.loss = sum(losses)
        if wants_logits(output_logits, batch, mask):
            output.prediction_logits = self.mlm(x, ctx)
        return output if mask is None else leave(output, mask)


class BertForMaskedLM(Headed):
    """The masked language model alone; logits as in `BertForPreTraining`, under the name `logits`.

    With a causal config it is Hugging Face's BertLMHeadModel, but for `labels`, which are not shifted here: what a
    label stands at predicts it. Its sums are `clm_loss`, `clm_correct` and `clm_count`.
    """

    objective = "BertForMaskedLM"

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return example_mlm_targets(config, lengths, draw)

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=False, backend=backend)
        self.mlm = MLMHead(config)
        initialise(self.mlm, config)
        self.tie()

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
        seed=None, output_logits: bool | None = None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: [B, S], -100 where there is nothing to predict."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        batch = with_mlm_labels(batch, mask, labels, self.config)
        ctx, encoded = self.encode(batch, seed, **wanted)
        output = Output(hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        if batch.mlm_rows is not None:
            output.loss, correct = self.mlm.loss(encoded.last_hidden_state, ctx)
            name = "clm" if self.config.causal else "mlm"
            record(output, name, output.loss, correct, len(batch.mlm_rows))
        if wants_logits(output_logits, batch, mask):
            output.prediction_logits = self.mlm(encoded.last_hidden_state, ctx)
        if mask is not None:
            leave(output, mask)
        output.logits, output.prediction_logits = output.prediction_logits, None
        return output


def score_pairs(output: Output, name: str, labels: Tensor) -> Tensor:
    """The mean loss over the pairs of a batch; labels: [B], 0, 1 or ignored."""
    logits, field = output.seq_relationship_logits, "next_sentence_label" if name == "nsp" else f"{name}_labels"
    check_shape(field, labels, logits[:, 0])
    check_classes(field, labels, 2)
    loss, correct = cross_entropy(logits.float(), labels), (logits.argmax(-1) == labels).sum()
    return record(output, name, loss, correct, len(labels))


def record(output: Output, name: str, loss: Tensor, correct: Tensor, count: int) -> Tensor:
    """Set the sums of an objective; returns its loss."""
    for field, value in (("loss", loss), ("correct", correct), ("count", count)):
        setattr(output, f"{name}_{field}", value)
    return loss


def wants_logits(asked: bool | None, batch: Batch, mask: Tensor | None) -> bool:
    """Logits over the vocabulary are the default, except for a packed batch with labels."""
    unlabelled = batch.mlm_rows is None and batch.nsp_labels is None and batch.sop_labels is None
    return (mask is not None or unlabelled) if asked is None else asked


def with_mlm_labels(batch: Batch, mask: Tensor | None, labels: Tensor | None, config: BertConfig) -> Batch:
    """Put Hugging Face's `labels` [B, S] into the batch as rows and labels."""
    if labels is not None:
        if mask is None:
            raise ValueError("a packed Batch carries its own mlm_rows and mlm_labels: pass labels=None")
        labels = pack_labels(labels, mask)
        rows = (labels != IGNORE).nonzero().squeeze(1)
        batch = dataclasses.replace(batch, mlm_rows=rows, mlm_labels=labels[rows])
    if batch.mlm_labels is not None:
        check_classes("labels", batch.mlm_labels, config.vocab_size)
    return batch


def pack_labels(labels: Tensor, mask: Tensor) -> Tensor:
    """Hugging Face's `labels` [B, S] to those of the packed tokens [T]."""
    if labels.shape != mask.shape:
        raise ValueError(f"labels has shape {list(labels.shape)}: expected {list(mask.shape)}, as input_ids")
    if ((labels != IGNORE) & ~mask).any():
        raise ValueError(f"labels has targets where attention_mask is 0: set them to {IGNORE}")
    return labels[mask]
