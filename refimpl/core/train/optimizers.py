"""The optimiser of a training: made from a recipe or by a function, told from others, saved and taken up to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from refimpl.core.arguments import shown
from refimpl.core.errors import OptionError, nearest
from refimpl.core.train.checkpoints import like, whole

if TYPE_CHECKING:
    from refimpl.core.train.loop import Recipe

OPTIMIZERS = ("adamw", "sgd")

MakeOptimizer = Callable[[list[dict[str, Any]], "Recipe"], Optimizer]


def parameter_groups(
    model: nn.Module, parameters: Sequence[dict[str, Any]] | None, recipe: Recipe
) -> list[dict[str, Any]]:
    """Class and options of an optimiser.

    Args:
        model: gives its trainable parameters: those of two or more dimensions with the recipe's weight decay, and the
            rest without.
        parameters: groups to use instead.
        recipe: its `lr` and `weight_decay` are those of groups that have none of their own.

    Returns:
        Groups with "params", "lr" and "weight_decay"; none is empty.

    Raises:
        OptionError: there is nothing to train.

    Example:
        >>> from refimpl.core.train.loop import Recipe
        >>> groups = parameter_groups(nn.Linear(3, 1), None, Recipe(steps=1, lr=0.1, weight_decay=0.01))
        >>> [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 0.01, 1), (0.1, 0.0, 1)]
    """
    if parameters is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
        ]
    else:
        groups = [
            {"weight_decay": recipe.weight_decay, **group, "params": list(group["params"])} for group in parameters
        ]
    groups = [{"lr": recipe.lr, **group} for group in groups if group["params"]]
    if not groups:
        raise OptionError("model: none of its parameters require a gradient; call requires_grad_() on those to train")
    return groups


def make_optimizer(groups: list[dict[str, Any]], recipe: Recipe, make: MakeOptimizer | None) -> Optimizer:
    """The optimiser of a recipe, or the one that a function makes; each group knows its "highest_lr".

    Args:
        groups: from `parameter_groups`.
        recipe: names "adamw" or "sgd", with their options.
        make: ``make(groups, recipe)``, in place of the recipe's.

    Raises:
        OptionError: `make` is no function, or makes no optimiser with a learning rate in each group.

    Example:
        >>> from refimpl.core.train.loop import Recipe
        >>> recipe = Recipe(steps=1, lr=0.1)
        >>> groups = parameter_groups(nn.Linear(3, 1), None, recipe)
        >>> optimizer = make_optimizer(groups, recipe, lambda groups, recipe: torch.optim.RMSprop(groups))
        >>> type(optimizer).__name__, optimizer.param_groups[0]["highest_lr"]
        ('RMSprop', 0.1)
    """
    if make is None and recipe.optimizer == "sgd":
        optimizer: Any = torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    elif make is None:
        optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas)
    elif isinstance(make, str) or not callable(make):
        raise OptionError(
            f"optimizer={shown(make)}: pass a function of the parameter groups and the recipe that makes one, or name "
            f"{nearest(str(make), OPTIMIZERS)} in the recipe"
        )
    else:
        optimizer = make(groups, recipe)
        if not isinstance(optimizer, Optimizer):
            raise OptionError(f"optimizer: it made a {type(optimizer).__name__}; return a torch.optim.Optimizer")
    for number, group in enumerate(optimizer.param_groups):
        if "lr" not in group:
            raise OptionError(f"optimizer: its group {number} has no 'lr' for the schedule to set; give it one")
        group["highest_lr"] = float(group["lr"])
    return optimizer


def identity(optimizer: Optimizer) -> dict[str, Any]:
    """Whatever tells an optimiser from another: its class, and the options of its groups.

    Example:
        >>> about = identity(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9))
        >>> about["class"], about["groups"][0]["momentum"]
        ('torch.optim.sgd.SGD', 0.9)
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return value if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__

    kind = type(optimizer)
    groups = [
        {key: plain(value) for key, value in group.items() if key not in ("params", "lr")}
        for group in optimizer.param_groups
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "groups": groups}


def optimizer_state(optimizer: Optimizer, keep: bool = True) -> dict[str, Any]:
    """``optimizer.state_dict()``, gathered where parameters are sharded: then all processes call it.

    Args:
        optimizer: any.
        keep: as in `whole`.

    Raises:
        OptionError: a parameter is sharded, but a tensor of its state is not sharded like it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer_state(torch.optim.SGD([weight], lr=0.1))["state"]
        {}
    """
    saved = optimizer.state_dict()
    for number, parameter in enumerate(_parameters(optimizer)):
        if hasattr(parameter, "device_mesh") and number in saved["state"]:
            for name, value in saved["state"][number].items():
                placed = [getattr(each, "placements", None) for each in (value, parameter)]
                if (
                    isinstance(value, Tensor)
                    and value.dim()
                    and (placed[0] != placed[1] or value.shape != parameter.shape)
                ):
                    raise OptionError(
                        f"optimizer: its state {name!r} {list(value.shape)} of a sharded parameter "
                        f"{list(parameter.shape)} is not sharded like it, so no one file can hold it; train a model that "
                        "is not sharded, or without folder="
                    )
    return whole(saved, keep)


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Give an optimiser the state it had, to the bit.

    ``load_state_dict`` alone casts what belongs to a parameter to that parameter's dtype.

    Args:
        optimizer: made as the one that was saved.
        saved: from `optimizer_state`.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = torch.optim.SGD([weight], lr=0.1)
        >>> groups = optimizer.state_dict()["param_groups"]
        >>> codes = torch.tensor([1, 2], dtype=torch.int8)
        >>> load_optimizer_state(optimizer, {"state": {0: {"codes": codes}}, "param_groups": groups})
        >>> optimizer.state[weight]["codes"].dtype
        torch.int8
    """
    optimizer.load_state_dict(saved)
    for number, parameter in enumerate(_parameters(optimizer)):
        if number in saved["state"]:
            loaded = optimizer.state[parameter]
            for name, value in saved["state"][number].items():
                if name in loaded:
                    loaded[name] = _exactly(value, loaded[name], parameter)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _exactly(value: Any, loaded: Any, parameter: Tensor) -> Any:
    """`value`, where it is a tensor on the device of the one that was loaded."""
    if isinstance(value, Tensor):
        return like(value, parameter) if hasattr(parameter, "device_mesh") and value.dim() else value.to(loaded.device)
    if isinstance(value, dict):
        return {key: _exactly(entry, loaded[key], parameter) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_exactly(*pair, parameter) for pair in zip(value, loaded, strict=True))
    return value
