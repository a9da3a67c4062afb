"""Cross entropy of a projection to the vocabulary, of which neither the logits [N, V] nor their gradient ever exist.

With z = h · weightᵀ + bias for each row h that has a label y, smoothing s, and q = (1 - s) · onehot(y) + s / V:

    loss = log Σ_v exp(z_v) - Σ_v q_v z_v,    dz = softmax(z) - q
    dhidden = dz · weight,    dweight = Σ_rows dzᵀ h,    dbias = Σ_rows dz

Rows come in chunks whose logits take at most CHUNK_BYTES. While they exist the softmax turns them into dz in place, in
one kernel or in torch, and the products with dz follow: three products in all and no recomputation, so backward only
multiplies by the gradient of the loss. With a gradient for each row (reduction="none") backward runs the loop again.
Rows without a label are left out. All that is not a matrix product moves 2 V elements a row: logits in, dz out (3 where
the row does not fit into registers). Rows of logits are padded to a multiple of 128 bytes and masked there, so that
accesses are of 16 bytes for any V; a bias of -inf, padded once a call, keeps the padded columns out of the sum.
Saved: the gradients of the sum of losses, dhidden in hidden's dtype, dweight and dbias in float32. They are divided by
the number of labels in backward, because in float16 a mean's dz would be lost.
"""

import torch
import torch.nn.functional as F

from . import reference
from ._triton import tl, triton
from .dispatch import check_device, check_floating, is_disabled, on_host, use_triton
from .jit import kernel
from .launch import FP_FUSION, AotCase, aot_arguments, cross_entropy_plan, on_device
from .op import Op

CHUNK_BYTES = 64 * 2**20
STRIP_BYTES = 4 * 2**20  # of logits in float32 that torch works on at a time, in a CPU's cache
REDUCTIONS = ("mean", "sum", "none")
PADDING = 64  # columns that rows of logits are padded to a multiple of: 128 bytes of bfloat16


def padded(vocab: int) -> int:
    """Columns of a row of logits in memory."""
    return -(-vocab // PADDING) * PADDING


def chunk_rows(vocab: int, element_size: int) -> int:
    """Rows of padded logits that fit into CHUNK_BYTES: a multiple of 128 where possible."""
    rows = max(1, CHUNK_BYTES // (padded(vocab) * element_size))
    return rows if rows < 128 else rows // 128 * 128


@triton.jit
def _load_logits(logits_ptr, bias_ptr, col, wanted):
    """Logits in float32; those of padded columns are -inf, by the bias, and so are those past them."""
    x = tl.load(logits_ptr + col, mask=wanted, other=float("-inf")).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + col, mask=wanted, other=float("-inf")).to(tl.float32)
    return x


@triton.jit
def _number_ahead(logits_ptr, bias_ptr, target, label, end, n_padded, BLOCK_N: tl.constexpr):
    """How many of `end` columns argmax would take before the label: the first of equals, and NaN over every number."""
    col, ahead = tl.arange(0, BLOCK_N), tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, end, BLOCK_N):
        x = _load_logits(logits_ptr, bias_ptr, start + col, start + col < n_padded)
        first = start + col < label
        beats = tl.where(target == target, (x != x) | (x > target) | ((x == target) & first), (x != x) & first)
        ahead += (beats & (start + col < end)).to(tl.int32)
    return tl.sum(ahead, 0)


@kernel()
def _cross_entropy_kernel(
    logits_ptr, bias_ptr,        # [rows, padded], replaced by dz · row_weight; [padded], -inf past n_cols, or None
    labels_ptr, row_weight_ptr,  # int64 [rows]; fp32 [rows] or None for 1
    loss_ptr, correct_ptr,       # fp32 [rows], bool [rows]
    n_cols, n_padded, ignore_index, smoothing,  # smoothing is None for 0
    GRADIENT: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr, PADDING: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * n_padded
    label = tl.load(labels_ptr + row)
    counted = label != ignore_index
    # a label outside of the vocabulary reads nothing, and its loss is not a number
    in_vocabulary = (label >= 0) & (label < n_cols)
    target = tl.load(logits_ptr + label, mask=in_vocabulary, other=float("nan")).to(tl.float32)
    if bias_ptr is not None:
        target += tl.load(bias_ptr + label, mask=in_vocabulary, other=0.0).to(tl.float32)
    base = tl.where(tl.abs(target) < float("inf"), target, 0.0)

    # masks are at the padded width, a multiple of 16 bytes; of a row without a label nothing is read
    col = tl.arange(0, BLOCK_N)
    x = tl.zeros([BLOCK_N], tl.float32)
    peak, shift = tl.full([], float("-inf"), tl.float32), tl.full([], 0.0, tl.float32)
    total, spread = tl.full([], 0.0, tl.float32), tl.full([], 0.0, tl.float32)
    for start in range(0, n_cols, BLOCK_N):
        x = _load_logits(logits_ptr, bias_ptr, start + col, (start + col < n_padded) & counted)
        if smoothing is not None:
            spread += tl.sum(tl.where(start + col < n_cols, x - base, 0.0), 0)
        top = tl.maximum(peak, tl.max(x, 0))
        # where all are -inf so far, exp(-inf - 0) is 0 while exp(-inf + inf) is not a number
        shift = tl.where(top == float("-inf"), 0.0, top)
        x = tl.exp(x - shift)
        total = total * tl.exp(peak - shift) + tl.sum(x, 0)
        peak = top

    loss = tl.log(total) + (peak - target)
    if smoothing is not None:
        loss = tl.log(total) + (1.0 - smoothing) * (peak - target) + smoothing * (peak - base - spread / n_cols)
    ahead = tl.full([], 1, tl.int32)
    if counted & ((target == peak) | (total != total)):
        # without NaN only an equal logit before the label can win
        end = tl.where(total == total, label.to(tl.int32), n_cols)
        ahead = _number_ahead(logits_ptr, bias_ptr, target, label, end, n_padded, 2048)
    tl.store(loss_ptr + row, tl.where(counted, loss, 0.0))
    tl.store(correct_ptr + row, counted & in_vocabulary & (ahead == 0))
    if GRADIENT:
        scale = tl.where(counted, 1.0, 0.0)
        if row_weight_ptr is not None:
            scale *= tl.load(row_weight_ptr + row, mask=counted, other=0.0)
        by_label, by_all = scale, tl.full([], 0.0, tl.float32)
        if smoothing is not None:
            by_label, by_all = scale * (1.0 - smoothing), scale * (smoothing / n_cols)
        scale = tl.where(counted, scale / total, 0.0)
        for start in range(0, n_cols, BLOCK_N):
            if WIDE:
                x = _load_logits(logits_ptr, bias_ptr, start + col, (start + col < n_padded) & counted)
                x = tl.exp(x - shift)
            dz = x * scale
            if smoothing is not None:
                dz -= by_all
            tl.store(logits_ptr + start + col, dz.to(logits_ptr.dtype.element_ty), mask=start + col < n_padded)
        # others wrote over these elements; padded columns stay finite for the rows of the next chunk
        tl.debug_barrier()
        dtarget = tl.exp(target - shift) * scale - by_all - by_label
        tl.store(logits_ptr + label, dtarget.to(logits_ptr.dtype.element_ty), mask=counted & in_vocabulary)
        padding = n_cols + tl.arange(0, PADDING)
        tl.store(logits_ptr + padding, tl.zeros([PADDING], logits_ptr.dtype.element_ty), mask=padding < n_padded)


def _padded_bias(bias, vocab, like):
    """[padded], with -inf in the padded columns, or None where there are neither those nor a bias."""
    padding = padded(vocab) - vocab
    if bias is None:
        bias = like.new_zeros(vocab) if padding else None
    return None if bias is None else F.pad(bias, (0, padding), value=float("-inf")).contiguous()


def _softmax_by_kernel(logits, bias, labels, row_weight, ignore_index, smoothing, gradient):
    """Losses and correct flags of a chunk, whose logits (without bias) become their gradient in place.

    Args:
        logits: [rows, V], a view of [rows, padded], which holds finite numbers past V.
        bias: by `_padded_bias`.
    """
    rows, cols = logits.shape
    losses, correct = logits.new_empty(rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.bool)
    plan = cross_entropy_plan(cols)
    with on_device(logits):
        _cross_entropy_kernel[(rows,)](
            logits, bias, labels.contiguous(), None if row_weight is None else row_weight.contiguous(), losses, correct,
            cols, logits.stride(0), ignore_index, smoothing or None,
            GRADIENT=gradient, WIDE=plan.block < cols, BLOCK_N=plan.block, PADDING=PADDING,
            num_warps=plan.num_warps, num_stages=1, enable_fp_fusion=FP_FUSION,
        )  # fmt: skip
    return losses, correct


def _softmax_by_torch(logits, labels, row_weight, ignore_index, smoothing, gradient):
    """The same in torch (the bias is in the logits), a strip of rows at a time."""
    found = []
    wide = torch.promote_types(logits.dtype, torch.float32)
    strip = max(1, STRIP_BYTES // (logits.shape[1] * 4))
    for start in range(0, len(logits), strip):
        narrow, label = logits[start : start + strip], labels[start : start + strip, None]
        counted = label != ignore_index
        label = torch.where(counted, label, 0)
        x = narrow.to(wide)
        peak, first = x.max(-1, keepdim=True)
        x.sub_(peak)
        loss = x.gather(-1, label).mul_(smoothing - 1.0)
        if smoothing:
            loss -= smoothing * x.mean(-1, keepdim=True)
        total = x.exp_().sum(-1, keepdim=True)
        found.append((torch.where(counted, loss + total.log(), 0), (first == label) & counted))
        if gradient:
            weight = 1.0 if row_weight is None else row_weight[start : start + strip, None]
            x.mul_(weight / total)
            if smoothing:
                x -= smoothing / x.shape[1] * weight
            x.scatter_add_(-1, label, torch.full_like(total, smoothing - 1.0) * weight)
            narrow.copy_(x.masked_fill_(~counted, 0.0))
    return (torch.cat(column).squeeze(-1) for column in zip(*found, strict=True))


def _labelled_rows(labels, ignore_index, max_labels):
    """int64 indices of the rows that enter the products, or None for all of them."""
    if max_labels is None:
        if labels.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        rows = (labels != ignore_index).nonzero().squeeze(-1)
        return None if len(rows) == len(labels) else rows
    if max_labels >= len(labels):
        return None
    return torch.argsort(labels == ignore_index, stable=True)[:max_labels]


def _accumulate(dweight, dlogits, hidden, beta):
    """dweight = beta · dweight + dlogitsᵀ · hidden, in place; dweight is float32 where they are narrower."""
    if dweight.dtype == hidden.dtype:
        torch.addmm(dweight, dlogits.mT, hidden, beta=beta, out=dweight)
    elif hidden.is_cuda:
        torch.addmm(dweight, dlogits.mT, hidden, out_dtype=dweight.dtype, beta=beta, out=dweight)
    else:
        # a sum over rows, not their mean, may be more than float16 holds
        narrow = hidden.dtype == torch.bfloat16
        product = dlogits.mT @ hidden if narrow else dlogits.mT.to(dweight.dtype) @ hidden.to(dweight.dtype)
        dweight.mul_(beta).add_(product) if beta else dweight.copy_(product)


def _loop(hidden, weight, bias, labels, ignore_index, smoothing, max_labels, kernel, wanted, row_weight=None):
    """Over chunks of rows: losses [N], correct flags [N], and the gradients of Σ row_weight · loss.

    Args:
        wanted: whether hidden, weight and bias need one; it is empty where not.
    """
    rows = _labelled_rows(labels, ignore_index, max_labels)
    total, vocab = len(labels) if rows is None else len(rows), len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses, correct = hidden.new_zeros(len(labels), dtype=wide), labels.new_zeros(len(labels), dtype=torch.bool)
    dhidden = hidden.new_zeros(hidden.shape if wanted[0] else 0)
    dweight = (hidden.new_empty if total else hidden.new_zeros)(weight.shape if wanted[1] else 0, dtype=wide)
    dbias = hidden.new_zeros(vocab if wanted[2] else 0, dtype=wide)
    chunk = min(chunk_rows(vocab, hidden.element_size()), total)
    buffer = hidden.new_empty(chunk, padded(vocab))
    buffer[:, vocab:] = 0  # a product on the CPU reads one more bfloat16 where the vocabulary is odd
    kernel_bias = _padded_bias(bias, vocab, hidden) if kernel else None
    for start in range(0, total, chunk or 1):
        part = slice(start, start + chunk) if rows is None else rows[start : start + chunk]
        h, label = hidden[part], labels[part]
        logits = buffer[: len(h), :vocab]
        options = label, None if row_weight is None else row_weight[part], ignore_index, smoothing, any(wanted)
        if kernel:
            torch.mm(h, weight.mT, out=logits)
            losses[part], correct[part] = _softmax_by_kernel(logits, kernel_bias, *options)
        else:
            torch.mm(h, weight.mT, out=logits) if bias is None else torch.addmm(bias, h, weight.mT, out=logits)
            losses[part], correct[part] = _softmax_by_torch(logits, *options)
        if wanted[0]:
            dhidden[part] = logits @ weight
        if wanted[1]:
            _accumulate(dweight, logits, h, beta=min(start, 1))
        if wanted[2]:
            dbias += logits.sum(0, dtype=wide)
    return losses, correct, dhidden, dweight, dbias


def _run_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    max_labels: int | None,
    each_row: bool,
    kernel: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted = [False] * 3 if each_row else wanted
    with torch.autocast(hidden.device.type, enabled=False):
        losses, correct, *gradients = _loop(
            hidden, weight, bias, labels, ignore_index, smoothing, max_labels, kernel, wanted
        )  # fmt: skip
    return losses if each_row else losses.sum(), correct if each_row else correct.sum(), *gradients


def _fake_forward(hidden, weight, bias, labels, ignore_index, smoothing, max_labels, each_row, kernel, wanted):
    wide, shape = torch.promote_types(hidden.dtype, torch.float32), labels.shape if each_row else ()
    wanted = [False] * 3 if each_row else wanted
    return (
        hidden.new_empty(shape, dtype=wide),
        labels.new_empty(shape, dtype=torch.bool if each_row else torch.int64),
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        hidden.new_empty(weight.shape if wanted[1] else 0, dtype=wide),
        hidden.new_empty(weight.shape[:1] if wanted[2] else 0, dtype=wide),
    )


def _run_backward(
    dloss: torch.Tensor,
    dhidden: torch.Tensor,
    dweight: torch.Tensor,
    dbias: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # [1], not []: a scalar would be rounded to the dtype of dhidden before the product
    dloss = dloss.reshape(1)
    return tuple(torch.mul(d, dloss, out=d.new_empty(d.shape, dtype=dtype)) for d in (dhidden, dweight, dbias))


def _fake_backward(dloss, dhidden, dweight, dbias, dtype):
    return tuple(d.new_empty(d.shape, dtype=dtype) for d in (dhidden, dweight, dbias))


def _run_rows_backward(
    dlosses: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    ignore_index: int,
    smoothing: float,
    max_labels: int | None,
    kernel: bool,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(hidden.device.type, enabled=False):
        _, _, *gradients = _loop(
            hidden, weight, bias, labels, ignore_index, smoothing, max_labels, kernel, wanted, dlosses
        )  # fmt: skip
    return tuple(d if d.dtype == hidden.dtype else d.to(hidden.dtype) for d in gradients)


def _fake_rows_backward(dlosses, hidden, weight, bias, labels, ignore_index, smoothing, max_labels, kernel, wanted):
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    return tuple(hidden.new_empty(shape if want else 0) for shape, want in zip(shapes, wanted, strict=True))


def _save(ctx, inputs, output):
    hidden, weight, bias, labels, *options, ctx.each_row, kernel, ctx.wanted = inputs
    ctx.dtype, ctx.options = hidden.dtype, (*options, kernel, ctx.wanted)
    if ctx.each_row:
        ctx.save_for_backward(hidden, weight, bias, labels)
    else:
        ctx.save_for_backward(*output[2:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 10
    if torch.is_grad_enabled():
        # the gradients were computed beforehand: a derivative of them would be zero in silence
        raise NotImplementedError("linear_cross_entropy has no second derivative: use backend='reference'")
    if ctx.each_row:
        gradients = _rows_backward(dloss, *ctx.saved_tensors, *ctx.options)
    else:
        gradients = _backward(dloss, *ctx.saved_tensors, ctx.dtype)
    return *(d if want else None for d, want in zip(gradients, ctx.wanted, strict=True)), *(None,) * 7


_backward = Op("linear_cross_entropy_bwd", _run_backward, _fake_backward)
_rows_backward = Op("linear_cross_entropy_rows_bwd", _run_rows_backward, _fake_rows_backward)
_forward = Op("linear_cross_entropy_fwd", _run_forward, _fake_forward, save=_save, gradient=_gradient)


def linear_cross_entropy(
    hidden, weight, bias, labels, *, ignore_index=-100, label_smoothing=0.0, reduction="mean", max_labels=None,
    backend="auto",
):  # fmt: skip
    """Cross entropy of hidden · weightᵀ + bias over the rows that have a label, in bounded memory.

    Args:
        hidden: [N, D]; weight: [V, D]; bias: [V] or None; one dtype, any strides. Under autocast they are cast to its
            dtype.
        labels: int64 [N], in [0, V) or ignore_index, which tokens after the last sequence have, too: their hidden
            states must be finite. On a GPU another label makes the loss NaN.
        label_smoothing: in [0, 1], the share of the target that is spread over the vocabulary (Szegedy et al., 2016).
        reduction: "mean" over the rows that have a label, "sum", or "none".
        max_labels: an upper bound of the number of labelled rows. N where the caller selected the rows: all enter. By
            default they are counted, which on a GPU waits for it, except while a stream is captured: there all enter.
            Rows with a label beyond the bound are left out on a GPU.
        backend: "auto" (a kernel on CUDA, else torch; both in chunks), "triton" or "reference" (all logits at once).
    Returns:
        (loss, correct): a float32 scalar, 0 with zero gradients where every row is ignored, and the int64 count of rows
        whose largest logit (the first of equals) is the label. With "none" losses [N], 0 where ignored, and bools [N].
    Raises:
        ValueError: names the argument that does not fit the others.
    """
    if reference.under_autocast(hidden):
        dtype = reference.autocast_dtype(hidden)
        hidden, weight, bias = (None if t is None else t.to(dtype) for t in (hidden, weight, bias))
    _check(hidden, weight, bias, labels, ignore_index, label_smoothing, reduction, max_labels)
    kernel = use_triton("linear_cross_entropy", backend, hidden)
    if backend == "reference" or is_disabled("linear_cross_entropy"):
        return reference.linear_cross_entropy(
            hidden, weight, bias, labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
            reduction=reduction, max_labels=max_labels,
        )  # fmt: skip
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    loss, correct, *_ = _forward(
        hidden, weight, bias, labels, ignore_index, float(label_smoothing), max_labels, reduction == "none", kernel,
        wanted,
    )  # fmt: skip
    if reduction == "mean":
        loss = loss / (labels != ignore_index).sum().clamp(min=1)
    return loss, correct


def _check(hidden, weight, bias, labels, ignore_index, label_smoothing, reduction, max_labels):
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} is not in [0, 1]")
    if max_labels is not None and max_labels < 0:
        raise ValueError(f"max_labels={max_labels} is negative: expected how many rows have a label at most, or None")
    if hidden.ndim != 2:
        raise ValueError(f"hidden is {list(hidden.shape)}: expected [N, D]")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or len(weight) == 0:
        raise ValueError(f"weight is {list(weight.shape)}: expected [V, {hidden.shape[1]}] with V of at least 1")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {list(bias.shape)}: expected [{len(weight)}], as many as weight has rows")
    if labels.dtype != torch.int64 or labels.shape != hidden.shape[:1]:
        raise ValueError(f"labels is {labels.dtype} {list(labels.shape)}: expected int64 [{len(hidden)}], one a row")
    check_device(hidden=hidden, weight=weight, bias=bias, labels=labels)
    check_floating(hidden=hidden)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, hidden is {hidden.dtype}: expected one dtype")
    if on_host(labels):
        _check_labels(labels, len(weight), ignore_index, max_labels)


def _check_labels(labels, vocab, ignore_index, max_labels):
    counted = labels != ignore_index
    wrong = counted & ((labels < 0) | (labels >= vocab))
    if wrong.any():
        raise ValueError(
            f"labels has {int(labels[wrong][0])} at {int(wrong.nonzero()[0])}: expected [0, {vocab}) or {ignore_index}"
        )
    if max_labels is not None and int(counted.sum()) > max_labels:
        raise ValueError(f"max_labels={max_labels}: {int(counted.sum())} rows have a label")


def aot_cases(capability):
    """The default plans in bfloat16: a row in registers, and two BERTs' vocabularies; as `AotCase`s for `xray`."""
    for vocab in (16384, 30522, 119547):
        for gradient in (True, False):
            plan = cross_entropy_plan(vocab)
            arguments = aot_arguments(
                _cross_entropy_kernel,
                logits_ptr="*bf16", bias_ptr="*bf16", labels_ptr="*i64", row_weight_ptr=None, loss_ptr="*fp32",
                correct_ptr="*i1", n_cols=vocab, n_padded=padded(vocab), ignore_index=-100,
                smoothing=None, GRADIENT=gradient, WIDE=plan.block < vocab, BLOCK_N=plan.block, PADDING=PADDING,
            )  # fmt: skip
            yield AotCase(
                op="linear_cross_entropy", direction="fwd", label=f"V={vocab}{' with gradient' * gradient}",
                fn=_cross_entropy_kernel, **arguments, num_warps=plan.num_warps, num_stages=1,
            )  # fmt: skip
