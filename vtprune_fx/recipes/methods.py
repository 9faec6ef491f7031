"""What each pruning method is, in a few lines, and where it is from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """A pruning method.

    Attributes:
        title: Its name.
        source: Where it is published.
        explanation: How it chooses and where it cuts.
    """

    title: str
    source: str
    explanation: str


METHODS: dict[str, Method] = {
    "fitprune": Method(
        "FitPrune",
        "arXiv:2409.10197",
        "After the attention of nearly every layer a few tokens are dropped: those "
        "with the least attention from the text after the images, times the least from "
        "other visual tokens, each the largest over heads.",
    ),
    "sparsevlm": Method(
        "SparseVLM",
        "arXiv:2410.04417, code of versions 1.0 and 1.5",
        "After three layers those tokens are dropped that get the least attention from "
        "the text that the images call for. Some are clustered into new tokens. "
        "Positions are compacted. In the paper and in version 1.0 the number dropped "
        "follows the rank of that attention.",
    ),
    "sparsevlm-plus": Method(
        "SparseVLM+",
        "arXiv:2410.04417, code of version 2.0",
        "SparseVLM with attention freed from its decay over rotary distance, over the "
        "heads that look at images most; no new tokens, positions kept.",
    ),
    "fastv": Method(
        "FastV",
        "arXiv:2403.06764",
        "After one early layer those tokens are dropped that the last token attends "
        "to least.",
    ),
    "pyramiddrop": Method(
        "PyramidDrop",
        "arXiv:2410.17247",
        "Before three layers half of the tokens are dropped: those that the last token "
        "would attend to least in that layer. Positions are compacted.",
    ),
    "vtw": Method(
        "VTW",
        "arXiv:2405.05803",
        "All visual tokens are dropped in the middle of the decoder.",
    ),
    "dart": Method(
        "DART",
        "arXiv:2502.11494",
        "After one early layer those tokens are dropped whose keys are most like those "
        "of a few pivots: duplicates. Needs no attention.",
    ),
    "divprune": Method(
        "DivPrune",
        "arXiv:2503.02175",
        "Before the first layer those tokens are dropped that are most like others: "
        "the kept ones are chosen one by one, each as far as can be from those before.",
    ),
    "visionzip": Method(
        "VisionZip",
        "arXiv:2412.04467",
        "Before the first layer those tokens are kept that the vision tower's class "
        "token attends to most; the others are merged into a few by the tower's keys. "
        "Positions are compacted.",
    ),
    "baseline": Method(
        "Baseline",
        "for comparison",
        "The cuts of another recipe, with tokens chosen at random, evenly spaced, or "
        "the wrong way round.",
    ),
    "custom": Method("Custom", "your scorer", "See vtprune_fx.register_scorer."),
}
"""Methods by the name that recipes use."""
