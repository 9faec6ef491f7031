"""The fake mode of a graph's values, and how operators run in it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph


def fake_mode_of(graph: Graph) -> FakeTensorMode:
    """The fake mode of the graph's values.

    Not ``detect_fake_mode``, which asks the compiler at work first: the values of a
    graph whose length was a number are in another mode (``literal_length``).
    """
    values = (node.meta.get("val") for node in graph.nodes)
    return next(v.fake_mode for v in values if isinstance(v, FakeTensor))


@contextlib.contextmanager
def uncached_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Run operators on fakes without remembering them.

    After cuts nearly every symbolic size is new; the mode's cache then only costs,
    about as much again as the operators.
    """
    enabled, mode.cache_enabled = mode.cache_enabled, False
    try:
        yield
    finally:
        mode.cache_enabled = enabled


@contextlib.contextmanager
def lengths_from_data(mode: FakeTensorMode) -> Iterator[None]:
    """Let operators on fakes return numbers, and sizes, that are new symbols.

    Dynamo forbids both where it may break a graph instead, and takes a backend that
    asks for one to ask for that: the graph would run unpruned.
    """
    shapes = mode.shape_env
    assert shapes is not None, "Dynamo's sizes are symbols"
    settings = shapes.settings
    shapes.settings = dataclasses.replace(
        settings, allow_dynamic_output_shape_ops=True, allow_scalar_outputs=True
    )
    try:
        yield
    finally:
        shapes.settings = settings
