"""Other numbers at a recipe's cuts: scaled to a budget, or another recipe's."""

from __future__ import annotations

import bisect

from vtprune_fx.errors import InputError
from vtprune_fx.recipes.counting import Geometry, cost
from vtprune_fx.recipes.schema import Recipe


def scaled(recipe: Recipe, budget: float, geometry: Geometry) -> Recipe:
    """A recipe with all drops scaled by one factor, the least that meets a budget.

    Cut i drops ``floor(drop_i * k / sum(drop))`` of the reference count of visual
    tokens, with k the smallest integer that saves enough.

    Args:
        recipe: Counts or shares.
        budget: Share of the decoder's MACs on visual tokens to save, for a sample with
            the reference count and no text (``Cost.visual``); 0 keeps all tokens.
        geometry: Sizes of the decoder.

    Raises:
        InputError: The cuts cannot save so much, whatever they drop; or the budget is
            no share.
    """
    reference = recipe.of or recipe.visual_tokens
    total = sum(cut.drop for cut in recipe.cuts)

    def made(k: int) -> Recipe:
        cuts = tuple(
            cut.model_copy(update={"drop": cut.drop * k // max(total, 1)})
            for cut in recipe.cuts
        )
        name = f"{recipe.name}-budget-{budget:g}"
        return recipe.model_copy(update={"name": name, "cuts": cuts})

    def saved(k: int) -> float:
        return cost(made(k), geometry, reference, text_tokens=0).visual.saved

    most = saved(reference)
    if not 0 <= budget <= most:
        raise InputError(
            f"budget for the cuts of recipe {recipe.name}",
            expected=f"0, which keeps all tokens, to {most:.3f}, which drops all",
            found=f"{budget:g}",
            fix="Choose a budget in between, or compile with earlier cuts.",
        )
    return made(bisect.bisect_left(range(reference + 1), budget, key=saved))


def check_same_places(compiled: Recipe, asked: Recipe) -> None:
    """Refuse numbers for cuts that a compiled model does not have.

    Args:
        compiled: What the model was compiled with, the cuts that drop something.
        asked: What it should run with: some of those cuts, with the same score.

    Raises:
        InputError: It has other cuts, or chooses tokens by another rule.
    """
    if asked.adaptive or asked.recycle is not None:
        raise _other(
            compiled, asked, "plain counts or shares", "rules by rank or merging"
        )
    rules = [
        (recipe.score, recipe.scorer_options(), recipe.positions)
        for recipe in (compiled, asked)
    ]
    if rules[0] != rules[1]:
        names = "score {}, options {}, positions {}".format
        raise _other(compiled, asked, names(*rules[0]), names(*rules[1]))
    places = [(cut.layer, cut.site) for cut in compiled.cuts]
    for cut in asked.cuts:
        if cut.drop and (cut.layer, cut.site) not in places:
            listed = ", ".join(f"{site} {layer}" for layer, site in places)
            raise _other(compiled, asked, f"cuts {listed}", f"{cut.site} {cut.layer}")


def _other(compiled: Recipe, asked: Recipe, expected: str, found: str) -> InputError:
    return InputError(
        f"schedule {asked.name}",
        expected=f"{expected}, as the model was compiled with {compiled.name}",
        found=found,
        fix="Call vtprune_fx.undo(model), and compile the model with that recipe.",
    )
