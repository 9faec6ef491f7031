"""Recipes that ship with the package, and recipes from files and fields."""

from __future__ import annotations

from importlib import resources
from json import JSONDecodeError
from pathlib import Path

from pydantic import ValidationError

from vtprune_fx.errors import RecipeError, first_sentence
from vtprune_fx.files import parse_json, read_whole
from vtprune_fx.recipes.schema import Recipe

MAX_QUOTED = 200
"""Characters of a wrong value that an error message quotes."""

MOST_BYTES = 2**20
"""Size of the largest recipe file."""


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package, sorted."""
    files = resources.files("vtprune_fx.recipes").joinpath("data").iterdir()
    return sorted(
        f.name.removesuffix(".json") for f in files if f.name.endswith(".json")
    )


def load_recipe(source: str | Path | Recipe | dict[str, object]) -> Recipe:
    """Load a recipe by shipped name, from a file, or from its fields.

    Args:
        source: A name that ``recipe_names()`` lists, a path to a JSON file, a mapping
            of fields, or a recipe, which is returned as it is.

    Raises:
        RecipeError: The name or file does not exist, the file is not JSON, or a field
            is missing, unknown or wrong.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, dict):
        return _validate(source, where="recipe")
    text = _read(source)
    try:
        fields = parse_json(text)
    except ValueError as error:
        line = f", line {error.lineno}" if isinstance(error, JSONDecodeError) else ""
        found = getattr(error, "msg", None) or first_sentence(error)
        raise RecipeError(
            f"recipe {source}{line}",
            expected="JSON",
            found=found,
            fix="`vtprune recipes show NAME --json` prints a valid recipe.",
        ) from error
    return _validate(fields, where=f"recipe {source}")


def _read(source: str | Path) -> str:
    if str(source) in recipe_names():
        shipped = resources.files("vtprune_fx.recipes") / "data" / f"{source}.json"
        return shipped.read_text(encoding="utf-8")
    try:
        return read_whole(source, MOST_BYTES).decode("utf-8")
    except (OSError, ValueError) as error:
        binary = isinstance(error, UnicodeDecodeError)
        raise RecipeError(
            f"recipe {str(source)!r}",
            expected="the name of a shipped recipe or a recipe file",
            found="a file that is not text"
            if binary
            else getattr(error, "strerror", None) or str(error),
            fix="`vtprune recipes` lists the shipped recipes.",
        ) from error


def _validate(fields: object, where: str) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        kind, context = first["type"], first.get("ctx", {})
        place = ".".join(map(str, first["loc"])) or context.get("place")
        found = "nothing" if kind == "missing" else repr(first["input"])
        found = context["found"] if kind == "vtprune" else found
        found = repr(context["tag"]) if kind == "union_tag_invalid" else found
        raise RecipeError(
            f"{where}, field {place}" if place else where,
            expected=_expected(kind, first["msg"]),
            found=found if len(found) < MAX_QUOTED else found[:MAX_QUOTED] + "...",
            fix="`vtprune recipes show NAME --json` prints a valid recipe.",
        ) from error


def _expected(kind: str, message: str) -> str:
    if kind == "extra_forbidden":
        return "no such field"
    if kind.startswith("union_tag"):
        return "a field 'rule' that is 'keep' or 'drop'"
    return message[0].lower() + message[1:]
