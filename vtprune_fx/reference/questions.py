"""Questions about drawn pictures, with the one answer that is right.

Eight kinds. Each needs particular places of the picture, and none can be answered from
its words: yes and no are equally frequent, and "no" names things that look alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vtprune_fx.reference.pictures import (
    COLOURS,
    DIGITS,
    SHAPES,
    SIDE,
    SPLITS,
    Picture,
    Thing,
    draw_picture,
)

TWO_PICTURES = 0.2
"""Share of samples with two pictures."""

CROWDS = {1: (4, 7), 2: (3, 5)}
"""Fewest and most things in one picture, and in each of two."""

ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "centre", "right")
"""Names of the thirds of a picture."""
_MARGIN = 8.0
"""Pixels between a centre and the border of the place that a question names."""
MOST = 3
"""The largest number that is asked for."""
_OPENERS = (
    "Look at the picture.",
    "Answer in a few words.",
    "This is a puzzle for the eyes.",
    "Look closely, then answer the question with as few words as you can.",
)

T = TypeVar("T")

Drawn = tuple[str, str, Sequence[Thing]]
"""A question, its answer, and the things that the answer rests on."""


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        kind: One of ``KINDS``.
        text: What is asked.
        answer: The right answer, word by word.
        about: The things that it rests on: without any other it is still right.
    """

    kind: str
    text: str
    answer: str
    about: tuple[Thing, ...]


@dataclass(frozen=True, eq=False)
class Sample:
    """Pictures, and questions about them.

    Attributes:
        pictures: One or two.
        questions: Any number.
    """

    pictures: tuple[Picture, ...]
    questions: tuple[Question, ...]


def draw_samples(split: str, seed: int, count: int) -> Iterator[Sample]:
    """Draw samples with one question each; the same for the same arguments.

    The first ``n`` samples do not depend on ``count``.

    Args:
        split: A key of ``pictures.SPLITS``.
        seed: Anything from 0 on.
        count: How many.
    """
    for index in range(count):
        rng = np.random.default_rng((list(SPLITS).index(split), seed, index))
        pictures = 2 if rng.random() < TWO_PICTURES else 1
        yield draw_sample(rng, split, pictures, 1)


def draw_sample(
    rng: np.random.Generator,
    split: str,
    pictures: int,
    questions: int,
    things: tuple[int, int] | None = None,
) -> Sample:
    """Draw pictures and questions about them, the kinds equally often.

    Args:
        rng: Decides everything.
        split: A key of ``pictures.SPLITS``.
        pictures: One or two. Of two, each is less crowded.
        questions: How many.
        things: Fewest and most in a picture; as many as when tested if left out.
    """
    fewest, most = things or CROWDS[pictures]
    while True:
        drawn = tuple(draw_picture(rng, split, fewest, most) for _ in range(pictures))
        asked: list[Question] = []
        for _ in range(4 * questions):
            question = _ask(rng, drawn)
            if question is not None:
                asked.append(question)
            if len(asked) == questions:
                return Sample(drawn, tuple(asked))


def _ask(rng: np.random.Generator, pictures: Sequence[Picture]) -> Question | None:
    """One question of a random kind, or None where the pictures give none."""
    kinds = [*_ABOUT_ONE] if len(pictures) == 1 else [*_ABOUT_ONE, "picture"]
    kind = str(rng.choice(kinds))
    if kind == "picture":
        drawn = _picture(rng, pictures)
    else:
        which = int(rng.integers(len(pictures)))
        tail = "" if len(pictures) == 1 else f" in the {_ORDINALS[which]} picture"
        drawn = _ABOUT_ONE[kind](rng, pictures[which].things, tail)
    if drawn is None:
        return None
    text, answer, about = drawn
    if rng.random() < 0.25:
        text = f"{rng.choice(_OPENERS)} {text}"
    return Question(kind, text, answer, tuple(about))


_ORDINALS = ("first", "second")


def _colour(
    rng: np.random.Generator, things: Sequence[Thing], tail: str
) -> Drawn | None:
    thing = _pick(rng, things)
    name = _name(rng, thing, things, colour=False)
    if name is None:
        return None
    text = _pick(rng, ("What colour is the {}{}?", "Tell me the colour of the {}{}."))
    return text.format(name, tail), thing.colour, [thing]


def _digit(
    rng: np.random.Generator, things: Sequence[Thing], tail: str
) -> Drawn | None:
    digits = [thing for thing in things if thing.is_digit]
    if not digits:
        return None
    thing = _pick(rng, digits)
    name = _name(rng, thing, things, noun=False)
    if name is None:
        return None
    text = _pick(rng, ("Which digit is the {}{}?", "Read the {}{}."))
    return text.format(name, tail), thing.noun, [thing]


def _count(
    rng: np.random.Generator, things: Sequence[Thing], tail: str
) -> Drawn | None:
    if rng.random() < 0.2:  # of something that need not be there
        noun, colour = str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS)))
    else:
        thing = _pick(rng, things)
        noun, colour = thing.noun, thing.colour
    noun = "digit" if noun in DIGITS else noun
    form = int(rng.integers(3))
    wanted = [
        thing
        for thing in things
        if (form == 0 or _noun(thing) == noun) and (form == 1 or thing.colour == colour)
    ]
    if len(wanted) > MOST:
        return None
    plural = (f"{colour} things", _plural(noun), f"{colour} {_plural(noun)}")[form]
    text = _pick(rng, ("How many {} are there{}?", "Count the {}{}."))
    return text.format(plural, tail), str(len(wanted)), wanted


def _where(
    rng: np.random.Generator, things: Sequence[Thing], tail: str
) -> Drawn | None:
    thing = _pick(rng, things)
    name, place = _name(rng, thing, things), _place_of(thing)
    if name is None or place is None:
        return None
    return f"Where is the {name}{tail}?", place, [thing]


def _exists(
    rng: np.random.Generator, things: Sequence[Thing], tail: str
) -> Drawn | None:
    about: list[Thing] = []
    if rng.random() < 0.5:
        about = [_pick(rng, things)]
        colour, noun = about[0].colour, _noun(about[0])
    else:
        # Both words fit something in the picture, but no one thing.
        colours, nouns = {t.colour for t in things}, {_noun(t) for t in things}
        pairs = {(t.colour, _noun(t)) for t in things}
        absent = sorted(set(itertools.product(colours, nouns)) - pairs)
        if not absent:
            return None
        colour, noun = absent[rng.integers(len(absent))]
    text = _pick(rng, ("Is there {}{}?", "Can you see {}{}?"))
    wanted = _with_article(f"{colour} {noun}")
    return text.format(wanted, tail), _YES_NO[not about], about


def _compare(
    rng: np.random.Generator, things: Sequence[Thing], tail: str
) -> Drawn | None:
    large = [thing for thing in things if thing.size == "large"]
    small = [thing for thing in things if thing.size == "small"]
    if not large or not small:
        return None
    pair = [_pick(rng, large), _pick(rng, small)]
    turned = bool(rng.random() < 0.5)
    first, second = (
        _name(rng, thing, things, size=False) for thing in pair[:: -1 if turned else 1]
    )
    if first is None or second is None:
        return None
    text = f"Is the {first} larger than the {second}{tail}?"
    return text, _YES_NO[turned], pair


def _what(rng: np.random.Generator, things: Sequence[Thing], tail: str) -> Drawn | None:
    place = _place_of(_pick(rng, things))
    if place is None or not all(_is_clear_of(place, thing) for thing in things):
        return None
    inside = [thing for thing in things if _place_of(thing) == place]
    if len(inside) != 1:
        return None
    thing = inside[0]
    answer = f"a {thing.size} {thing.colour} {thing.noun}"
    text = _pick(rng, ("What is in the {}{}?", "What do you see in the {}{}?"))
    return text.format(place, tail), answer, inside


def _picture(rng: np.random.Generator, pictures: Sequence[Picture]) -> Drawn | None:
    which = int(rng.integers(len(pictures)))
    thing = _pick(rng, pictures[which].things)
    pair = (thing.colour, _noun(thing))
    if any((t.colour, _noun(t)) == pair for t in pictures[1 - which].things):
        return None
    wanted = _with_article(" ".join(pair))
    return f"Which picture shows {wanted}?", f"the {_ORDINALS[which]}", [thing]


_ABOUT_ONE: dict[
    str, Callable[[np.random.Generator, Sequence[Thing], str], Drawn | None]
] = {
    "colour": _colour,
    "digit": _digit,
    "count": _count,
    "where": _where,
    "exists": _exists,
    "compare": _compare,
    "what": _what,
}
KINDS = (*_ABOUT_ONE, "picture")
"""Kinds of questions; the last needs two pictures."""

_YES_NO = ("yes", "no")


def _pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def _noun(thing: Thing) -> str:
    return "digit" if thing.is_digit else thing.noun


def _plural(noun: str) -> str:
    return f"{noun}es" if noun == "cross" else f"{noun}s"


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(
    rng: np.random.Generator,
    thing: Thing,
    things: Sequence[Thing],
    *,
    size: bool = True,
    colour: bool = True,
    noun: bool = True,
) -> str | None:
    """Words that fit this thing and no other, or None.

    Args:
        rng: Chooses among the names that fit.
        thing: What is named.
        things: All that is there.
        size: Whether the name may include its size.
        colour: Whether the name may include its colour.
        noun: Whether the name of a digit may include its value.
    """
    nouns = {_noun(thing), thing.noun} if noun else {_noun(thing)}
    forms = itertools.product(("", thing.size), ("", thing.colour), sorted(nouns))
    names = [
        " ".join(filter(None, form))
        for form in forms
        if (size or not form[0])
        and (colour or not form[1])
        and sum(_fits(form, other) for other in things) == 1
    ]
    return _pick(rng, names) if names else None


def _fits(form: tuple[str, str, str], thing: Thing) -> bool:
    size, colour, noun = form
    return (
        size in ("", thing.size)
        and colour in ("", thing.colour)
        and noun in (thing.noun, _noun(thing))
    )


def _place_of(thing: Thing) -> str | None:
    """Which ninth of the picture a thing is in, or None near a border of one."""
    third = SIDE / 3
    for at in (thing.x, thing.y):
        if min(abs(at - third), abs(at - 2 * third)) < _MARGIN:
            return None
    row, column = ROWS[int(thing.y // third)], COLUMNS[int(thing.x // third)]
    return column if (row, column) == ("middle", "centre") else f"{row} {column}"


def _is_clear_of(place: str, thing: Thing) -> bool:
    """Whether the thing is clearly in the place, or clearly not."""
    return _place_of(thing) is not None or place not in _places_near(thing)


def _places_near(thing: Thing) -> set[str | None]:
    # Two margins further, a thing is out of the border's reach on either side.
    columns, rows = (
        [max(0.0, at - 2 * _MARGIN), at, min(SIDE - 1.0, at + 2 * _MARGIN)]
        for at in (thing.x, thing.y)
    )
    return {
        _place_of(Thing("", "", "", x, y, 0.0))
        for x, y in itertools.product(columns, rows)
    }
