"""The optimizers that BERTs are trained with, and their state as named tensors."""

import re

import torch
from torch import Tensor, nn

from minibert_kernels.lamb import lamb_step

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, biases and norms (fewer than two axes) do not; a tied parameter is counted once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def filled_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    return [group for group in param_groups(model, weight_decay) if group["params"]]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) with BERT's eps, as one fused kernel where torch has it (CUDA and CPU)."""
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    return torch.optim.AdamW(filled_groups(model, weight_decay), lr=lr, betas=betas, eps=eps, fused=fused)


class Lamb(torch.optim.Optimizer):
    """LAMB (You et al., 2020): each tensor's step is scaled by its trust ratio, for batches of tens of thousands.

    Contiguous parameters only; a group is updated by two kernels on a GPU. A group may have its own value of each of
    lr, betas, eps, weight_decay, trust_clip, adapt and bias_correction: see `minibert_kernels.lamb.lamb_step`.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, trust_clip=None, adapt=True,
        bias_correction=True,
    ):  # fmt: skip
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, defaults | {"trust_clip": trust_clip, "adapt": adapt, "bias_correction": bias_correction}
        )

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                states = [self._state_of(p) for p in params]
                steps, exp_avgs, exp_avg_sqs = ([state[moment] for state in states] for moment in MOMENTS)
                torch._foreach_add_(steps, 1)
                options = {name: group[name] for name in self.defaults} | {"step": torch.stack(steps)}
                tensors = [params, [p.grad for p in params], exp_avgs, exp_avg_sqs]
                if hasattr(params[0], "to_local"):  # a DTensor, which the kernels do not know
                    if group["adapt"]:  # in plain torch the norms are those of all ranks
                        options["backend"] = "reference"
                    else:
                        tensors = [[tensor.to_local() for tensor in each] for each in tensors]
                lamb_step(*tensors, **options)
        return loss

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        if not self.state[p]:
            wide = torch.promote_types(p.dtype, torch.float32)
            exp_avg, exp_avg_sq = (torch.zeros_like(p, dtype=wide) for _ in range(2))
            self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return self.state[p]


def lamb(model: nn.Module, lr: float, weight_decay: float = 0.01, betas=(0.9, 0.999), eps: float = 1e-6) -> Lamb:
    """LAMB as You et al. train BERT: biases and norms neither decay nor adapt."""
    groups = [group | {"adapt": group["params"][0].ndim >= 2} for group in filled_groups(model, weight_decay)]
    return Lamb(groups, lr=lr, betas=betas, eps=eps)


def bertadam(model: nn.Module, lr: float, weight_decay: float = 0.01, betas=(0.9, 0.999), eps: float = 1e-6) -> Lamb:
    """AdamW without bias correction, as Devlin et al. train BERT: its first steps are larger (Zhang et al., 2021).

    LAMB's step without its trust ratio.
    """
    groups = filled_groups(model, weight_decay)
    return Lamb(groups, lr=lr, betas=betas, eps=eps, adapt=False, bias_correction=False)


def sgd(
    model: nn.Module, lr: float, weight_decay: float = 0.01, betas=(0.9, 0.999), eps: float = 1e-6
) -> torch.optim.SGD:
    """Gradient descent with momentum betas[0]; the decay is part of the gradient. There is no second moment."""
    return torch.optim.SGD(filled_groups(model, weight_decay), lr=lr, momentum=betas[0])


# word -> (model, lr, weight_decay, betas, eps) -> optimizer
OPTIMIZERS = {"adamw": adamw, "bertadam": bertadam, "lamb": lamb, "sgd": sgd}
CAPTURABLE = ("adamw", "bertadam", "lamb")  # a group's lr may be a tensor on the device, which a CUDA graph reads anew


def depths(model: nn.Module) -> dict[str, int]:
    """How deep each parameter lies: 0 in the embeddings, 1 in the first of L layers, L + 1 in pooler and heads."""
    layers = {name: re.search(r"encoder\.layers\.(\d+)\.", name) for name, _ in model.named_parameters()}
    head = 1 + len({match[1] for match in layers.values() if match})
    return {
        name: 1 + int(match[1]) if match else 0 if "embeddings." in name else head for name, match in layers.items()
    }


def cut_by_depth(model: nn.Module, optimizer: torch.optim.Optimizer, layer_decay: float, unfreeze: float) -> None:
    """Cut the groups of a new optimizer by depth; the head's have the whole rate, and learn from the start.

    Each group gets `scale`, its share of the rate, `layer_decay` less a layer further down (Howard & Ruder, 2018;
    Clark et al., 2020); and `thaw`, the progress before which it does not learn, for the embeddings `unfreeze`.
    """
    known = depths(model)
    head = max(known.values())
    whole = layer_decay == 1 and not unfreeze  # a group is a kernel or two: no more of them than are needed
    depth = {p: head if whole else known[name] for name, p in model.named_parameters()}
    optimizer.param_groups = [
        group | {"params": params, "scale": layer_decay**below, "thaw": unfreeze * below / head}
        for group in optimizer.param_groups
        for below in range(head + 1)
        if (params := [p for p in group["params"] if depth[p] == head - below])
    ]


def drop_frozen(optimizer: torch.optim.Optimizer, progress: float) -> None:
    """Forget the gradients of groups that thaw later: no step and no moment comes of them."""
    for group in optimizer.param_groups:
        if progress < group["thaw"]:
            for p in group["params"]:
                p.grad = None


def moments_of(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of the tensors that it keeps of each parameter."""
    return ("momentum_buffer",) if isinstance(optimizer, torch.optim.SGD) else MOMENTS


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>.<moment>`; a parameter that never had a gradient has none."""
    return {
        f"{name}.{moment}": optimizer.state[p][moment].detach()
        for name, p in model.named_parameters()
        for moment in moments_of(optimizer)
        if optimizer.state.get(p, {}).get(moment) is not None
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put what `optimizer_state` gave back, bit for bit.

    Raises:
        ValueError: a tensor of no parameter, one of another shape, or a parameter with some of its moments only.
    """
    left, moments = dict(tensors), moments_of(optimizer)
    for name, p in model.named_parameters():
        state = {moment: left.pop(f"{name}.{moment}") for moment in moments if f"{name}.{moment}" in left}
        if not state:
            continue
        lost = [moment for moment in moments if moment not in state]
        if lost:
            raise ValueError(f"the optimizer state of {name} has no {', '.join(lost)}")
        for moment, value in state.items():
            shape = torch.Size() if moment == "step" else p.shape
            if value.shape != shape:
                raise ValueError(f"{name}.{moment} has shape {list(value.shape)}: expected {list(shape)}")
        optimizer.state[p] = {moment: value.to(p.device, copy=True) for moment, value in state.items()}
    if left:
        raise ValueError(f"optimizer state of unknown parameters: {', '.join(sorted(left)[:5])}")
