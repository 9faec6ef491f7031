"""Per-sample counts: the number dropped follows from the rank of its attention.

SparseVLM (arXiv:2410.04417). P is the attention of the layer from the raters to the v
visual tokens present, mean over heads, [raters, v]. Its rank is the number of singular
values above ``largest * max(raters, v) * 2^-23``, what ``torch.linalg.matrix_rank``
counts in float32.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from vtprune_fx.errors import RecipeError


class _Rule(BaseModel):
    # 'lambda' is no name in Python.
    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)


class KeepByRank(_Rule):
    """``int(scale * rank + bias)`` are kept, at least none and at most v - 1.

    The published code of version 1.0.

    Attributes:
        rule: Which rule it is.
        scale: Tokens kept for each rank.
        bias: Tokens kept beside them.
    """

    rule: Literal["keep"] = "keep"
    scale: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bias: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    def __str__(self) -> str:
        return f"int({self.scale:g} r + {self.bias:g}) kept, v - 1 at most"

    def drop(self, rank: int, visual: int) -> int:
        """How many of ``visual`` tokens are dropped."""
        return visual - max(0, min(int(self.scale * rank + self.bias), visual - 1))


class DropByRank(_Rule):
    """``int(lambda (v - rank))`` are dropped.

    The paper; it does not say how the number is rounded.

    Attributes:
        rule: Which rule it is.
        factor: The paper's lambda, ``lambda`` in a file.
    """

    rule: Literal["drop"] = "drop"
    factor: Annotated[float, Field(gt=0, le=1, alias="lambda")]

    def __str__(self) -> str:
        return f"int({self.factor:g} (v - r)) dropped"

    def drop(self, rank: int, visual: int) -> int:
        """How many of ``visual`` tokens are dropped."""
        return int(self.factor * (visual - rank))


ByRank = Annotated[KeepByRank | DropByRank, Field(discriminator="rule")]
"""A rule; the field ``rule`` says which."""


def not_counted(name: str) -> RecipeError:
    """The error for a recipe whose counts are needed before all samples."""
    return RecipeError(
        f"recipe {name}",
        expected="a number of tokens to drop at each cut",
        found="numbers that follow the rank of each sample's attention",
        fix="Calibrate it first: `vtprune calibrate MODEL --recipe RECIPE --data DIR "
        "--output FILE` fixes them for a model.",
    )
