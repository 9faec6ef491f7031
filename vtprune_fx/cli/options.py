"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from vtprune_fx.errors import InputError

REFERENCE = "fitprune-reference-55"
"""The recipe for the reference model."""


LARGEST_SEED = 2**32 - 1
"""The largest seed that all generators of random numbers take."""


RecipeOption = Annotated[
    str, typer.Option("--recipe", help="Name of a shipped recipe, or a recipe file.")
]


CONFIG_HELP = "Name of a shipped configuration, model folder or config.json."


TextTokens = Annotated[int, typer.Option(help="Tokens that are not visual.")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


OptionalRecipe = Annotated[
    str | None,
    typer.Option("--recipe", help="Shipped name or file. Default: fitted by depth."),
]


DtypeOption = Annotated[
    Literal["float32", "float16", "bfloat16"],
    typer.Option("--dtype", help="Type of weights."),
]


ModelArgument = Annotated[
    str, typer.Argument(help="A checkpoint folder, or the id of a model on the hub.")
]


def check_device(device: str | None) -> None:
    """Refuse a device that torch does not know, or that this machine lacks.

    Raises:
        InputError: It is one.
    """
    import torch

    if device is None:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(
            "--device",
            expected="cpu, or cuda where there is a CUDA device that works",
            found=repr(device),
            fix="Omit it for cuda where there is one, else cpu.",
        ) from error
