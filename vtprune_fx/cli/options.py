"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

REFERENCE = "fitprune-reference-55"
"""The recipe for the reference model."""


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
