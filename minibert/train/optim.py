"""AdamW as BERT uses it, and its state as named tensors."""

import torch
from torch import Tensor, nn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay, biases and norms (fewer than two axes) do not; a tied parameter is counted once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def adamw(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter, 2019) with BERT's eps, as one fused kernel where torch has it (CUDA and CPU)."""
    fused = all(p.device.type in ("cuda", "cpu") for p in model.parameters())
    groups = [group for group in param_groups(model, weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """The optimizer's tensors as `<parameter>.<moment>`; a parameter that never had a gradient has none."""
    return {
        f"{name}.{moment}": optimizer.state[p][moment].detach().cpu()
        for name, p in model.named_parameters()
        for moment in MOMENTS
        if p in optimizer.state
    }


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]) -> None:
    """Put what `optimizer_state` gave back, bit for bit.

    Raises:
        ValueError: a tensor of no parameter, one of another shape, or a parameter with some of its moments only.
    """
    left = dict(tensors)
    for name, p in model.named_parameters():
        state = {moment: left.pop(f"{name}.{moment}") for moment in MOMENTS if f"{name}.{moment}" in left}
        if not state:
            continue
        lost = [moment for moment in MOMENTS if moment not in state]
        if lost:
            raise ValueError(f"the optimizer state of {name} has no {', '.join(lost)}")
        for moment, value in state.items():
            shape = torch.Size() if moment == "step" else p.shape
            if value.shape != shape:
                raise ValueError(f"{name}.{moment} has shape {list(value.shape)}: expected {list(shape)}")
        optimizer.state[p] = {moment: value.to(p.device, copy=True) for moment, value in state.items()}
    if left:
        raise ValueError(f"optimizer state of unknown parameters: {', '.join(sorted(left)[:5])}")
