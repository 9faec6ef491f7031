"""What a graph of an export returns, as the output of a language model.

Read off the outputs' names alone: an export may have been written by another release of
transformers, and what its files say about Python classes is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.exporters import ExportMetadata
from transformers.modeling_outputs import CausalLMOutputWithPast

from vtprune_fx.models.arguments import causal_output

KEEP_SETS = "keep_sets."
"""Name of a keep set's value in a prefill graph, before its layer's number."""

LOGITS = "logits"

_CACHED = re.compile(r"(?:output\.)?past_key_values\.layers\.(\d+)\.(keys|values)")


def bare_metadata(precision: str) -> ExportMetadata:
    """What transformers' runners need of a graph whose outputs are read here."""
    nothing = pytree.treespec_dumps(pytree.tree_structure(()))
    return ExportMetadata(export_dtype=precision, out_spec=nothing)


def causal_output_of(values: Mapping[str, Tensor]) -> CausalLMOutputWithPast:
    """Logits and cache among a graph's outputs; other outputs are passed over.

    Args:
        values: Outputs by name: ``logits`` [B, S, vocabulary], and
            ``past_key_values.layers.LAYER.keys`` and ``.values`` [B, G, N, D].
    """
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in values.items():
        if match := _CACHED.fullmatch(name):
            layers.setdefault(int(match[1]), {})[match[2]] = value
    cache = DynamicCache()
    cache.layers = [_filled_layer(**layers[index]) for index in sorted(layers)]
    return causal_output(values[LOGITS], cache)


def _filled_layer(keys: Tensor, values: Tensor) -> DynamicLayer:
    """A layer of a cache on these tensors, without a copy."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def keep_sets_of(values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """For each layer with a cut, [B, K]: positions among the tokens present there."""
    return {
        int(name.removeprefix(KEEP_SETS)): value
        for name, value in values.items()
        if name.startswith(KEEP_SETS)
    }
