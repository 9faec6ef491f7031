"""Tiny models, prompts for them, and the comparison with the oracle."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    GenerationMixin,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vtprune_fx import oracle
from vtprune_fx.analysis.anatomy import read
from vtprune_fx.api import KeepRecorder
from vtprune_fx.backend import vtprune_backend
from vtprune_fx.capture.aten import export
from vtprune_fx.graph.values import value_at_full_length
from vtprune_fx.models.arguments import PAST, cache_argument, cache_of
from vtprune_fx.models.ragged_attention import mark_dynamic
from vtprune_fx.planning.place import place
from vtprune_fx.planning.plan import PrunePlan
from vtprune_fx.recipes.schema import Cut, Provenance, Recipe, Site

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch.export import ExportedProgram

aten = torch.ops.aten

IMAGE, PAD = 99, 0
"""Image and padding token of the tiny models."""
PATCH = 14
VOCABULARY = 100

CACHE = cache_argument(GenerationMixin.prepare_inputs_for_generation) or PAST
"""What the installed transformers calls the argument that takes a cache."""

Inputs = dict[str, Tensor]
KeepSets = dict[int, Tensor]


@functools.cache
def tiny_llava(
    *,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int | None = None,
    image: int = 56,
    attention: str = "sdpa",
    decoder: str = "llama",
) -> LlavaForConditionalGeneration:
    """A LLaVA 32 wide, with weights that make attention far from uniform.

    Args:
        layers: Decoder layers.
        heads: Query heads of the decoder.
        kv_heads: Key and value heads, as many as query heads if left out.
        image: Width of an image in pixels: one visual token a patch of 14 x 14.
        attention: Attention implementation of transformers.
        decoder: Model type of the decoder.
    """
    torch.manual_seed(0)
    text = AutoConfig.for_model(
        decoder,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        head_dim=8,
        # At 0.3 float32 itself is up to 9.7e-5 from float64 (the oracle run in both),
        # so a bound of 1e-4 would test rounding; at 0.2 it is at most 9e-6.
        initializer_range=0.2,
        sliding_window=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE
    )
    model = LlavaForConditionalGeneration(config)
    model.train(mode=False)
    model.set_attn_implementation(attention)
    return model


def image_tokens(model: LlavaForConditionalGeneration) -> int:
    """Visual tokens of one image."""
    return (_image_width(model) // PATCH) ** 2


def _image_width(model: LlavaForConditionalGeneration) -> int:
    vision = model.config.vision_config
    assert isinstance(vision, CLIPVisionConfig)
    assert isinstance(vision.image_size, int)
    return vision.image_size


def batch(
    model: LlavaForConditionalGeneration, *prompts: Sequence[int], seed: int = 0
) -> Inputs:
    """Prompts in one batch, padded on the left, with an image of its own in each gap.

    Args:
        model: Its image size decides how many tokens an image takes.
        prompts: For each sample, how many text tokens stand ahead of, between and
            behind its images: ``(3, 6)`` has one image behind three tokens,
            ``(3, 0, 6)`` two side by side, ``(9,)`` none.
        seed: Of texts and images.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.full((image_tokens(model),), IMAGE)
    rows: list[Tensor] = []
    for texts in prompts:
        parts: list[Tensor] = []
        for count in texts:
            parts += [image, torch.randint(1, IMAGE, (count,), generator=generator)]
        rows.append(torch.cat(parts[1:]))
    width = _image_width(model)
    images = sum(len(texts) - 1 for texts in prompts)
    inputs = _padded(rows)
    if images:
        inputs["pixel_values"] = torch.randn(
            images, 3, width, width, generator=generator
        )
    return inputs


def _padded(rows: list[Tensor]) -> Inputs:
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, -len(row) :] = row
        mask[index, -len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def counted_positions(inputs: Inputs) -> Tensor:
    """Position ids that count each sample's own tokens, as ``generate`` makes them."""
    return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)


def recipe_for(
    layers: int,
    drops: Mapping[int, int],
    *,
    visual_tokens: int = 16,
    of: int | None = None,
    site: Site = "after_attention",
    **fields: Any,
) -> Recipe:
    """A recipe that drops ``drops[layer]`` visual tokens in a layer."""
    given = {"method": "fitprune", "score": "fitprune", "positions": "kept"} | fields
    cuts = [Cut(layer=at, drop=drops[at], site=site) for at in sorted(drops)]
    return Recipe(
        schema_version=1,
        name="test",
        layers=layers,
        visual_tokens=visual_tokens,
        of=of,
        cuts=tuple(cuts),
        provenance=Provenance(source="this test"),
        **given,
    )


# ------------------------------------------------------------------- the comparison


def cache_lengths(outputs: Any) -> list[int]:
    """Length of each layer's key cache; values must be as long."""
    layers = cache_of(outputs).layers
    assert all(layer.keys.shape == layer.values.shape for layer in layers)
    return [layer.keys.shape[2] for layer in layers]


def assert_matches_oracle(
    outputs: Any,
    keep_sets: KeepSets,
    model: LlavaForConditionalGeneration,
    recipe: Recipe,
    inputs: Inputs,
    atol: float = 1e-4,
) -> None:
    """Compare a pruned run with the oracle's, sample by sample.

    Logits of what is no padding, the tokens kept after every cut, cache lengths.
    Padding stands in front, so a sample's own rows are the last ones. It never leaves a
    sample with an image, and leaves in place of visual tokens one that has none.
    """
    samples = oracle.split_batch(model, **inputs)
    lengths = cache_lengths(outputs)
    for row, sample in enumerate(samples):
        run = oracle.prefill(model, recipe, sample)
        padding = inputs["input_ids"].shape[1] - len(sample.input_ids)
        own = outputs.logits[row, -len(run.logits) :]
        torch.testing.assert_close(own, run.logits, atol=atol, rtol=0)
        for layer, positions in keep_sets.items():
            kept = (positions[row] - padding).tolist()
            real = [position for position in kept if position >= 0]
            expected = [p for p in run.kept[layer].tolist() if p >= 0]
            assert real == expected, f"{layer=}, sample {row}"
        if len(sample.features):
            assert sorted(keep_sets) == sorted(run.scores), "layers with a cut"
            expected = [padding + keys.shape[1] for keys in run.keys]
            assert lengths == expected, f"sample {row}"
            assert outputs.logits.shape[1] == padding + len(run.logits), f"sample {row}"


# ------------------------------------------------------------- the Dynamo front end


@dataclasses.dataclass(eq=False)
class Inner:
    """An inner backend that keeps the graphs it gets, and runs them node by node.

    Attributes:
        graphs: All graphs so far, one for each compilation.
        ran: For each call so far, the graph that ran.
        recorded: For each call so far, its keep sets.
    """

    graphs: list[GraphModule] = dataclasses.field(default_factory=list)
    ran: list[GraphModule] = dataclasses.field(default_factory=list)
    recorded: list[KeepSets] = dataclasses.field(default_factory=list)

    @property
    def keep_sets(self) -> KeepSets:
        """Of the last graph that ran."""
        return self.recorded[-1]

    def __call__(
        self, module: GraphModule, example_inputs: Sequence[Tensor]
    ) -> Callable[..., Any]:
        """Compile a graph."""
        self.graphs.append(module)
        return functools.partial(self._run, module)

    def _run(self, module: GraphModule, *inputs: Any) -> Any:
        recorder = KeepRecorder(module)
        outputs = recorder.run(*inputs)
        self.ran.append(module)
        self.recorded.append(recorder.kept)
        return outputs


class Compiled:
    """A model compiled with the backend, prompt length dynamic.

    Args:
        model: The model.
        recipe: What to cut, or None for the default.
        inner: The inner backend; by default one that records.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        recipe: Recipe | str | None,
        inner: Inner | str | None = None,
    ) -> None:
        self.inner = Inner() if inner is None else inner
        # torch types options as numbers, texts and functions; a backend takes any.
        options: dict[str, Any] = {"recipe": recipe, "inner": self.inner}
        self._forward: Callable[..., Any] = torch.compile(
            model.forward, backend=vtprune_backend, options=options, fullgraph=True
        )

    @property
    def recorded(self) -> Inner:
        """The recording inner backend."""
        assert isinstance(self.inner, Inner)
        return self.inner

    def __call__(self, **inputs: Any) -> Any:
        """Run a prompt or a decode step."""
        if inputs["input_ids"].shape[1] > 1:
            names = ("input_ids", "attention_mask", "position_ids")
            mark_dynamic(1, *map(inputs.get, names))
        with torch.no_grad():
            return self._forward(**inputs)


# ---------------------------------------------------------------- looking at graphs


def assert_static(module: GraphModule) -> None:
    """No shape and no number on the host depends on data."""
    for node in calls(module):
        assert node.target not in _DYNAMIC, node.format_node()
        assert not _indexes_by_mask(node), node.format_node()
        for count in _selected(node):
            assert not isinstance(count, Node), node.format_node()


_DYNAMIC: frozenset[object] = frozenset(
    {
        aten.nonzero.default,
        aten.nonzero_static.default,
        aten.item.default,
        aten._local_scalar_dense.default,
        aten.masked_select.default,
        aten.repeat_interleave.Tensor,
        aten.unique_dim.default,
        aten._unique2.default,
    }
)


def _indexes_by_mask(node: Node) -> bool:
    if node.target not in {aten.index.Tensor, aten.index_put.default}:
        return False
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    kinds = {value_at_full_length(n).dtype for n in indices if isinstance(n, Node)}
    return bool(kinds & {torch.bool, torch.uint8})


def _selected(node: Node) -> Iterator[object]:
    """How many values a topk takes."""
    if node.target == aten.topk.default:
        yield node.args[1]


def calls(module: GraphModule, *targets: object) -> list[Node]:
    """Nodes that call one of ``targets``, or anything where none is given."""
    return [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and (not targets or node.target in targets)
    ]


def placeholder(module: GraphModule, name: str) -> Node:
    """The one input whose name holds ``name``."""
    found: Node
    [found] = [n for n in module.graph.find_nodes(op="placeholder") if name in n.name]
    return found


def is_dynamic(size: int | torch.SymInt) -> bool:
    """Whether a size was left open."""
    return not is_concrete_int(size)


# ------------------------------------------------------------ graphs to try passes on


@functools.cache
def exported_program(layers: int = 2) -> ExportedProgram:
    """An exported tiny model, not pruned. Copy its graph before you write to it."""
    model = tiny_llava(layers=layers)
    return export(model, batch(model, (3, 6)))


def planned(drops: Mapping[int, int], **told: Any) -> tuple[GraphModule, PrunePlan]:
    """A graph of two layers to write to, and a recipe (as told) placed on it."""
    module = copy.deepcopy(exported_program().graph_module)
    anatomy = read(module.graph)
    assert anatomy is not None
    return module, place(recipe_for(2, drops, **told), anatomy, module.graph)
