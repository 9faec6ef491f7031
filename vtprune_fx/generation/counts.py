"""How many tokens the cuts of a recipe drop in one batch of prompts.

A compiled prompt gets the numbers with each run, as ``PrunePlan.schedule``: no graph is
made for them, so they are checked here, before anything runs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from vtprune_fx.errors import InputError
from vtprune_fx.models.ragged_cache import Prompt
from vtprune_fx.recipes.schedule import common_count, dropped_before
from vtprune_fx.recipes.schema import Recipe


def places_of(recipe: Recipe) -> Recipe | None:
    """A recipe's cuts that drop tokens, whatever their numbers.

    None where numbers cannot come with each run: there are none, they follow the rank,
    or dropped tokens become new ones.
    """
    cuts = tuple(cut for cut in recipe.cuts if cut.drop)
    if not cuts or recipe.adaptive or recipe.recycle is not None:
        return None
    return recipe.model_copy(update={"cuts": cuts})


@dataclass(frozen=True)
class PromptCounts:
    """What a batch of prompts drops.

    Attributes:
        recipe: Whose cuts.
        visual: Visual tokens that its shares are taken of.
        per_sample: Whether each sample drops its share, and padding to make up for it.
    """

    recipe: Recipe
    visual: int
    per_sample: bool

    @classmethod
    def of(cls, recipe: Recipe, prompt: Prompt, *, per_sample: bool) -> Self:
        """The numbers of a batch.

        Args:
            recipe: What to cut.
            prompt: What is known of the batch.
            per_sample: Whether samples drop their shares even if these are equal.

        Raises:
            InputError: A sample has too few tokens to drop, or less than two are left.
        """
        visual: list[int] = prompt.visual.tolist()
        padding: list[int] = prompt.padding.tolist()
        uncut = not recipe.cuts and not per_sample
        if recipe.adaptive or uncut or not any(visual):
            return cls(recipe, max(visual), per_sample=False)
        shares = recipe.of is not None
        if not shares or not (per_sample or len({*visual} - {0}) > 1):
            found = cls(recipe, max(visual), per_sample=False)
        else:
            count = common_count(recipe, visual, padding)
            found = cls(recipe, count, per_sample=True)
        for sample in range(len(visual)):
            found._check(sample, visual[sample], padding[sample])
        found._check_left(prompt.came)
        return found

    def schedule(self, layers: Sequence[int]) -> Tensor:
        """[cuts, 3] int64: the numbers for cuts in some layers (``PrunePlan``)."""
        drops, of = self.recipe.drops(self.visual), self.recipe.of or 1
        shares = {cut.layer: cut.drop for cut in self.recipe.cuts}
        rows = [(drops.get(n, 0), shares.get(n, 0), of) for n in layers]
        return torch.tensor(rows, dtype=torch.int64)

    def dropped_before(self, visual: Tensor, layers: int) -> list[Tensor]:
        """[B] for each of so many layers: visual tokens that are dropped before it."""
        gone = [dropped_before(self.recipe, n, layers) for n in visual.tolist()]
        return list(torch.tensor(gone, device=visual.device).unbind(dim=1))

    def _check(self, sample: int, visual: int, padding: int) -> None:
        """Refuse a sample that would lose text."""
        if self.per_sample:
            self._check_padding(sample, visual, padding)
            return
        needed = self.recipe.needed(self.visual)
        if visual >= needed or (not visual and padding >= needed):
            return
        raise InputError(
            f"recipe {self.recipe.name}, sample {sample}",
            expected=f"at least {needed} visual tokens, or none and {needed} tokens of "
            "padding",
            found=f"{visual} visual tokens and {padding} of padding",
            fix="Run it by itself, or drop fewer tokens.",
        )

    def _check_padding(self, sample: int, visual: int, padding: int) -> None:
        """Refuse a sample without the padding to drop beside its visual tokens."""
        alone, common = self.recipe.drops(visual), self.recipe.drops(self.visual)
        layers = [cut.layer for cut in self.recipe.cuts]
        missing = (common.get(n, 0) - alone.get(n, 0) for n in layers)
        needed = max(itertools.accumulate(missing, initial=0))
        if padding < needed:
            raise InputError(
                f"recipe {self.recipe.name}, sample {sample}",
                expected=f"{needed} tokens of padding, dropped in place of visual ones",
                found=f"{visual} visual tokens and {padding} of padding",
                fix="Run it by itself, or pad the batch to more tokens.",
            )

    def _check_left(self, came: int) -> None:
        """Refuse to keep less than two tokens: a size of one would broadcast."""
        recipe = self.recipe
        left = recipe.tokens_per_layer(self.visual, recipe.layers)[-1]
        gone = self.visual - left
        if came - gone < 2:
            raise InputError(
                f"recipe {recipe.name}",
                expected=f"at least {gone + 2} tokens, of which two are kept",
                found=f"{came} tokens, {gone} of which are dropped",
                fix="Drop fewer, or prompt with more text.",
            )
