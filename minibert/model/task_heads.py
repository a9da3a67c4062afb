"""Heads for fine-tuning: whole sequences, tokens, spans, choices, pairs of entities, and embeddings.

Each takes a packed `Batch` or the Hugging Face call, with `labels` in the batch or as an argument, which wins. A label
of -100 is left out; where all are, the loss is 0 with zero gradients.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minibert_kernels import select_rows
from minibert_kernels.philox import keep_scale, row_keep

from ..batch import IGNORE, ROW_SHIFT, Batch, unpack
from ..config import BertConfig, one_of
from .context import Context, Output
from .crf import best_tags, crf_for, tag_loss
from .encoder import SITES, BertModel, enter, first_tokens, initialise, leave
from .heads import Headed, pack_labels
from .losses import check_classes, check_shape, classification_loss, cross_entropy, pair_loss, problem_type

POOLINGS = ("mean", "cls")
PAIR_LOSSES = ("cosine", "contrastive")


class TaskHead(Headed):
    """What the heads share: their dropout, a site behind all layers of the encoder, and the door back."""

    def __init__(self, config: BertConfig, *, add_pooler: bool, backend: str):
        super().__init__(config, add_pooler=add_pooler, backend=backend)
        p = config.classifier_dropout
        self.dropout = config.hidden_dropout_prob if p is None else p

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        layer = nn.Linear(inputs, outputs)
        initialise(layer, self.config)
        return layer

    def drop(self, x: Tensor, ctx: Context, counters: Tensor | None) -> Tensor:
        """Dropout of [N, D] keyed on `counters` [N], which only a model in training needs."""
        drop = ctx.drop(self.dropout, 1 + SITES * self.config.num_hidden_layers)
        if not drop:
            return x
        keep = row_keep(drop["seed"], drop["dropout"], counters, x.shape[-1])
        return torch.where(keep, x * keep_scale(drop["dropout"]), 0)

    def tokens(self, x: Tensor, ctx: Context, rows: Tensor | None) -> Tensor:
        """The states [N, D] of `rows`, of all tokens where that is None, after dropout."""
        if rows is None:
            return self.drop(x, ctx, ctx.rows)
        check_rows(rows, ctx.batch)
        counters = None if ctx.rows is None else ctx.rows[rows]
        return self.drop(select_rows(x, rows, backend=ctx.backend), ctx, counters)


class BertForSequenceClassification(TaskHead):
    """A linear map of the pooled state to `num_labels` scores: classes, several labels at once, or a number."""

    objective = "BertForSequenceClassification"

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return example_classes(config, len(lengths), draw)

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=True, backend=backend)
        self.classifier = self.linear(config.hidden_size, config.num_labels)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
        seed=None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: see `minibert.model.losses.classification_loss`."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        ctx, encoded = self.encode(batch, seed, **wanted)
        logits = self.classifier(self.drop(encoded.pooler_output, ctx, batch.seq_ids))
        labels = batch.labels if labels is None else labels
        output = Output(logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        if labels is not None:
            output.loss = classification_loss(self.config, logits, labels)
        return output if mask is None else leave(output, mask)


class BertForTokenClassification(TaskHead):
    """A linear map of token states to `num_labels` scores.

    Logits are [N, L] at the batch's `token_rows`, [T, L] where it has none, and [B, S, L] for the Hugging Face call.
    With `task_specific_params["crf"]` the loss is a CRF's, and a packed batch without labels gets `tags` [N] and
    `tag_probabilities` [N]: see `minibert.model.crf`.
    """

    objective = "BertForTokenClassification"

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return {"token_labels": draw(config.num_labels, int(lengths.sum()))}

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=False, backend=backend)
        self.classifier = self.linear(config.hidden_size, config.num_labels)
        self.crf = crf_for(config)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
        seed=None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: [N], as the batch's token_labels; [B, S] for the Hugging Face call, -100 at padding."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        labels = token_labels(labels, batch, mask)
        ctx, encoded = self.encode(batch, seed, **wanted)
        logits = self.classifier(self.tokens(encoded.last_hidden_state, ctx, batch.token_rows))
        output = Output(logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        if labels is not None:
            output.loss = tag_loss(self.crf, logits, labels, batch)
        elif self.crf is not None and mask is None:
            output.tags, output.tag_probabilities = best_tags(self.crf, logits, batch)
        return output if mask is None else leave_tokens(output, mask)


class BertForQuestionAnswering(TaskHead):
    """Scores of every token to be the first and the last of the answer (Devlin et al., 2019, section 4.2).

    `start_logits` and `end_logits` are [T]; for the Hugging Face call [B, S], with the lowest number of their dtype at
    padding. So, unlike there, padding takes no part in the loss, the mean of the two cross-entropies over each
    sequence's own tokens.
    """

    objective = "BertForQuestionAnswering"

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return {"labels": draw(int(lengths.min()), len(lengths), 2)}

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        if config.num_labels != 2:
            raise ValueError(f"id2label has {config.num_labels} names: an answer has two ends, pass num_labels=2")
        super().__init__(config, add_pooler=False, backend=backend)
        self.qa_outputs = self.linear(config.hidden_size, 2)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None,
        start_positions=None, end_positions=None, *, labels=None, seed=None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: [B, 2] positions within the sequence, or columns of input_ids, of the answer's first and last token;
        start_positions, end_positions: the same as two [B]. A position outside the sequence is ignored."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        labels = answers(labels, start_positions, end_positions, batch, mask)
        ctx, encoded = self.encode(batch, seed, **wanted)
        logits = self.qa_outputs(encoded.last_hidden_state)
        output = Output(hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        output.start_logits, output.end_logits = logits.unbind(-1)
        if labels is not None:
            padded = by_sequence(logits.float(), batch)  # two numbers a token: nothing beside the states
            output.loss = sum(cross_entropy(padded[..., end], labels[:, end]) for end in (0, 1)) / 2
        if mask is None:
            return output
        lowest = torch.finfo(logits.dtype).min
        output.start_logits, output.end_logits = unpack(logits, mask).masked_fill(~mask[..., None], lowest).unbind(-1)
        return leave(output, mask)


class BertForMultipleChoice(TaskHead):
    """A score of every choice's pooled state, [Q, choices]; the choices of a question are sequences in a row."""

    objective = "BertForMultipleChoice"
    paddable = False

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return {"labels": draw(len(lengths), 1)}  # all choices of one question

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=True, backend=backend)
        self.classifier = self.linear(config.hidden_size, 1)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, labels=None, *,
        num_choices: int | None = None, seed=None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """The Hugging Face call takes [Q, choices, S]; labels: [Q], the right choice.

        num_choices: of a packed batch; B / Q where it has labels, and one question where it has none.
        """
        given = [input_ids, attention_mask, token_type_ids, position_ids]
        if not isinstance(input_ids, Batch):
            if input_ids.ndim != 3:
                raise ValueError(f"input_ids has shape {list(input_ids.shape)}: expected [questions, choices, length]")
            num_choices = input_ids.shape[1]
            given = [x if x is None else x.flatten(0, 1) if x.ndim == 3 else x for x in given]
        batch, mask = enter(*given)
        labels = batch.labels if labels is None else labels
        if num_choices is None:
            num_choices = batch.num_sequences // max(1, 1 if labels is None else len(labels))
        if num_choices < 1 or batch.num_sequences % num_choices:
            raise ValueError(f"{batch.num_sequences} sequences are not questions of num_choices={num_choices} each")
        ctx, encoded = self.encode(batch, seed, **wanted)
        scores = self.classifier(self.drop(encoded.pooler_output, ctx, batch.seq_ids))
        logits = rearrange(scores, "(q c) 1 -> q c", c=num_choices)
        output = Output(logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        if labels is not None:
            check_shape("labels", labels, logits[:, 0])
            check_classes("labels", labels, num_choices)
            output.loss = cross_entropy(logits.float(), labels)
        return output if mask is None else leave(output, mask)


class BertForRelationExtraction(TaskHead):
    """A linear map of the states at two entities' starts, side by side (Baldini Soares et al., 2019, figure 3f).

    A packed batch names the two tokens of each sequence in `token_rows` [2·B].
    """

    objective = "BertForRelationExtraction"
    paddable = False
    in_transformers = False

    @classmethod
    def example_targets(cls, config, lengths, draw):
        return example_classes(config, len(lengths), draw)

    @classmethod
    def example_inputs(cls, lengths):
        ends = lengths.cumsum(0)
        return {"token_rows": torch.stack([ends - lengths, ends - 1], 1).flatten()}

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=False, backend=backend)
        self.classifier = self.linear(2 * config.hidden_size, config.num_labels)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None,
        entity_positions=None, labels=None, *, seed=None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: see `minibert.model.losses.classification_loss`; entity_positions: [B, 2] columns of input_ids."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        rows = entity_rows(entity_positions, batch, mask)
        ctx, encoded = self.encode(batch, seed, **wanted)
        entities = self.tokens(encoded.last_hidden_state, ctx, rows)
        logits = self.classifier(rearrange(entities, "(b two) d -> b (two d)", two=2))
        labels = batch.labels if labels is None else labels
        output = Output(logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        if labels is not None:
            output.loss = classification_loss(self.config, logits, labels)
        return output if mask is None else leave(output, mask)


class BertForJointClassification(TaskHead):
    """An intent of each sequence and a slot of each token, learned together (Chen et al., 2019).

    `logits` are the slots', named by the config's id2label, shaped and learned as in `BertForTokenClassification`;
    `sequence_logits` [B, I] are the intents', named by `task_specific_params["intents"]`. `loss` is the sum of the
    means `sequence_loss` and `token_loss`.
    """

    objective = "BertForJointClassification"
    in_transformers = False

    @classmethod
    def example_targets(cls, config, lengths, draw):
        slots = draw(config.num_labels, int(lengths.sum()))
        return {"token_labels": slots, "labels": draw(len(intents(config)), len(lengths))}

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=True, backend=backend)
        self.intent_classifier = self.linear(config.hidden_size, len(intents(config)))
        self.classifier = self.linear(config.hidden_size, config.num_labels)
        self.crf = crf_for(config)

    def forward(
        self, input_ids: Tensor | Batch, attention_mask=None, token_type_ids=None, position_ids=None, labels=None,
        intent_labels=None, *, seed=None, **wanted: bool,
    ) -> Output:  # fmt: skip
        """labels: as in `BertForTokenClassification`; intent_labels: [B] classes, as the batch's labels."""
        batch, mask = enter(input_ids, attention_mask, token_type_ids, position_ids)
        labels = token_labels(labels, batch, mask)
        intent_labels = batch.labels if intent_labels is None else intent_labels
        ctx, encoded = self.encode(batch, seed, **wanted)
        # the counter of position 0: a mask of its own, as no slot is read at [CLS]
        pooled = self.drop(encoded.pooler_output, ctx, batch.seq_ids << ROW_SHIFT)
        output = Output(hidden_states=encoded.hidden_states, attentions=encoded.attentions)
        output.sequence_logits = self.intent_classifier(pooled)
        output.logits = self.classifier(self.tokens(encoded.last_hidden_state, ctx, batch.token_rows))
        if intent_labels is not None:
            check_shape("intent_labels", intent_labels, output.sequence_logits[:, 0])
            check_classes("intent_labels", intent_labels, output.sequence_logits.shape[1])
            output.sequence_loss = cross_entropy(output.sequence_logits.float(), intent_labels)
        if labels is not None:
            output.token_loss = tag_loss(self.crf, output.logits, labels, batch)
        elif self.crf is not None and mask is None:
            output.tags, output.tag_probabilities = best_tags(self.crf, output.logits, batch)
        losses = [loss for loss in (output.sequence_loss, output.token_loss) if loss is not None]
        output.loss = sum(losses) if losses else None
        return output if mask is None else leave_tokens(output, mask)


class BertForSentenceEmbedding(BertModel):
    """One vector a sequence (Reimers and Gurevych, 2019): the mean of its tokens' states, [CLS] and [SEP] among them.

    `sentence_embedding` is [B, D]. `task_specific_params` may have `pooling`, "mean" or "cls", `normalize`, true for
    vectors of length 1, and `loss` and `temperature`, for pairs with labels: see `losses.pair_loss`. There are no
    parameters beside the encoder's, and it is saved as a `BertModel`.
    """

    objective = "BertForSentenceEmbedding"
    in_transformers = False

    def __init__(self, config: BertConfig, *, backend: str = "auto"):
        super().__init__(config, add_pooler=False, backend=backend)
        params = config.task_specific_params or {}
        self.pooling, self.normalize = params.get("pooling", "mean"), params.get("normalize", False)
        self.loss, self.temperature = params.get("loss", "cosine"), params.get("temperature", 0.05)
        one_of("loss", self.loss, PAIR_LOSSES)
        one_of("pooling", self.pooling, POOLINGS)
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize={self.normalize!r} is not true or false")

    def encode(self, ctx: Context, output_hidden_states: bool = False, output_attentions: bool = False) -> Output:
        output = super().encode(ctx, output_hidden_states, output_attentions)
        pool = mean_tokens if self.pooling == "mean" else first_tokens
        output.sentence_embedding = pool(output.last_hidden_state, ctx)
        if self.normalize:
            output.sentence_embedding = F.normalize(output.sentence_embedding.float(), dim=-1)
        if ctx.batch.labels is not None:
            output.loss = pair_loss(output.sentence_embedding, ctx.batch.labels, self.loss, self.temperature)
        return output


def example_classes(config: BertConfig, count: int, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
    """Targets of `classification_loss`, of the kind that config says."""
    classes = draw(config.num_labels, count)
    kind = problem_type(config, classes)
    if kind == "single_label_classification":
        return {"labels": classes}
    one = kind == "regression" and config.num_labels == 1
    return {"labels": draw(2, *((count,) if one else (count, config.num_labels))).float()}


def mean_tokens(x: Tensor, ctx: Context) -> Tensor:
    """The mean state of each sequence, [T, D] to [B, D]; zero for a sequence without tokens."""
    # a bag a sequence, of all its rows in order: summed in float32, in one fixed order, each row read once; and one bag
    # of the rows behind the last sequence
    return F.embedding_bag(torch.arange(len(x), device=x.device), x, ctx.batch.cu_seqlens.long(), mode="mean")[:-1]


def by_sequence(x: Tensor, batch: Batch) -> Tensor:
    """Packed [T, ...] to [B, S, ...], each sequence from column 0, with the lowest number of the dtype behind it."""
    sequences = batch.sequences
    columns = torch.arange(batch.num_tokens, device=x.device) - batch.cu_seqlens.long()[sequences]
    # one row more, for the tokens behind the last sequence
    padded = x.new_full((batch.num_sequences + 1, batch.max_seqlen, *x.shape[1:]), torch.finfo(x.dtype).min)
    return padded.index_put((sequences, columns.clamp(max=batch.max_seqlen - 1)), x)[:-1]


def leave_tokens(output: Output, mask: Tensor) -> Output:
    """`leave`, for logits of tokens."""
    output.logits = unpack(output.logits, mask)
    return leave(output, mask)


def token_labels(labels: Tensor | None, batch: Batch, mask: Tensor | None) -> Tensor | None:
    """[N]: those given, [B, S] for the Hugging Face call, or the batch's."""
    if labels is None:
        return batch.token_labels
    return labels if mask is None else pack_labels(labels, mask)


def answers(labels, starts, ends, batch: Batch, mask: Tensor | None) -> Tensor | None:
    """[B, 2] positions within each sequence, ignored where they lie outside it."""
    if (starts is None) != (ends is None):
        raise ValueError("start_positions and end_positions are one label: pass both or neither")
    if starts is not None:
        labels = torch.stack([starts.reshape(-1), ends.reshape(-1)], 1)
    labels = batch.labels if labels is None else labels
    if labels is None:
        return None
    if labels.shape != (batch.num_sequences, 2):
        raise ValueError(f"labels has shape {list(labels.shape)}: expected {[batch.num_sequences, 2]}, start and end")
    if mask is not None:
        labels = rows_at(labels, mask) - batch.first_rows[:, None]
    lengths = batch.cu_seqlens.diff()[:, None]
    return labels.masked_fill((labels < 0) | (labels >= lengths), IGNORE)


def entity_rows(positions: Tensor | None, batch: Batch, mask: Tensor | None) -> Tensor:
    """[2·B] rows of the packed batch, from the batch or from columns [B, 2] of the Hugging Face call."""
    if mask is None:
        if positions is not None:
            raise ValueError("a packed Batch carries its own token_rows: pass entity_positions=None")
        if batch.token_rows is None or batch.token_rows.shape != (2 * batch.num_sequences,):
            shape = None if batch.token_rows is None else list(batch.token_rows.shape)
            raise ValueError(f"token_rows has shape {shape}: expected {[2 * batch.num_sequences]}, two a sequence")
        return batch.token_rows
    if positions is None or positions.shape != (len(mask), 2):
        shape = None if positions is None else list(positions.shape)
        raise ValueError(f"entity_positions has shape {shape}: expected {[len(mask), 2]}")
    rows = rows_at(positions, mask)
    if (rows < 0).any():
        raise ValueError("entity_positions names a column outside its sequence, or of padding")
    return rows.flatten()


def rows_at(columns: Tensor, mask: Tensor) -> Tensor:
    """Columns [B, k] of the caller's [B, S] to rows of the packed batch, negative for what is no token."""
    rows = (mask.flatten().cumsum(0) - 1).view_as(mask).masked_fill(~mask, -1)
    inside = (columns >= 0) & (columns < mask.shape[1])
    return rows.gather(1, columns.clamp(0, mask.shape[1] - 1)).masked_fill(~inside, -1)


def intents(config: BertConfig) -> list[str]:
    """The second label set of a joint classifier."""
    names = (config.task_specific_params or {}).get("intents")
    named = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not named or len(set(names)) < len(names):
        raise ValueError(f"task_specific_params['intents']={names!r} is not a list of distinct names")
    return names


def check_rows(rows: Tensor, batch: Batch) -> None:
    """Refuse rows that are no tokens; looks at them on the CPU only, and not in a compiled graph."""
    if rows.ndim != 1:
        raise ValueError(f"token_rows has shape {list(rows.shape)}: expected [rows]")
    if rows.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = rows[(rows < 0) | (rows >= batch.num_tokens)]
        if wrong.numel():
            raise ValueError(f"token_rows holds {int(wrong[0])}: expected 0 to {batch.num_tokens - 1}")
