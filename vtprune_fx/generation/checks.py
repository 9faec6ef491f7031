"""What a pruned model refuses before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from vtprune_fx.errors import InputError
from vtprune_fx.generation.failures import mismatch
from vtprune_fx.models.arguments import CACHE_NAMES
from vtprune_fx.models.ragged_attention import ATTENTION
from vtprune_fx.recipes.counting import Geometry
from vtprune_fx.recipes.loading import load_recipe
from vtprune_fx.recipes.scaling import check_same_places, scaled
from vtprune_fx.recipes.schema import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments by which transformers' attention takes several sequences in one row."""

_CHECKPOINTING = "gradient_checkpointing"
"""What modules note that compute their inner values a second time in training."""

_UNDO = "Leave the option out, or call vtprune_fx.undo(model)."


def known_arguments(model: PreTrainedModel) -> frozenset[str]:
    """What a model's ``forward`` takes, or passes to its parts by ``**kwargs``."""
    decoder = model.get_decoder()
    functions: list[Callable[..., object]] = [
        model.forward,
        model.base_model.forward,
        decoder.forward,
    ]
    names = {name for f in functions for name in inspect.signature(f).parameters}
    # Decorators of transformers take these off before ``forward`` sees them.
    decorators = ("return_dict", "use_cache")
    options = TransformersKwargs.__annotations__
    return frozenset({*names, *CACHE_NAMES, *decorators, *options})


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that was changed since ``compile``, so that it cannot prune.

    Raises:
        InputError: Its attention was switched, it is compiled once more around its
            pruned graphs, or it trains with gradient checkpointing.
    """
    now = model.config.get_text_config()._attn_implementation
    if now != ATTENTION:
        raise InputError(
            f"attention of {type(model).__name__}",
            expected=f"{ATTENTION}, which vtprune_fx.compile set",
            found=now,
            fix="Call vtprune_fx.undo(model), switch, and compile the model again.",
        )
    modules = model.modules()
    if model.training and any(getattr(m, _CHECKPOINTING, False) for m in modules):
        raise InputError(
            type(model).__name__,
            expected="training without gradient checkpointing",
            found="gradient checkpointing, which runs layers a second time",
            fix="Turn it off by model.gradient_checkpointing_disable(), in "
            "transformers 5.24 activation_checkpointing_disable(), or call "
            "vtprune_fx.undo(model).",
        )


def check_not_traced() -> None:
    """Refuse to become part of another graph.

    Raises:
        InputError: ``torch.compile`` or ``torch.export`` traces the model.
    """
    if torch.compiler.is_compiling():
        raise InputError(
            "torch.compile",
            expected="a model that is compiled once",
            found="a model of vtprune_fx.compile, compiled or exported again",
            fix="Call it as it is. To compile it yourself, call vtprune_fx.undo(model) "
            "and pass backend=vtprune_fx.vtprune_backend.",
        )


def check_arguments(named: Mapping[str, object]) -> None:
    """Refuse arguments that a pruned prompt cannot honour.

    Raises:
        InputError: Attention's probabilities are asked for, or sequences are packed.
    """
    if named.get("output_attentions") is True:
        raise InputError(
            "output_attentions",
            expected="False",
            found="True, which a pruned model cannot run with",
            fix=f"Fused attention keeps no probabilities. {_UNDO}",
        )
    packed = [name for name in PACKED if named.get(name) is not None]
    if packed:
        raise InputError(
            packed[0],
            expected="one prompt in each row",
            found="lengths of packed prompts",
            fix="Give each prompt a row of the batch, padded on the left.",
        )


def check_labels(named: Mapping[str, object]) -> None:
    """Refuse a loss over a prompt that lost tokens.

    Raises:
        InputError: Labels are given.
    """
    if named.get("labels") is not None:
        raise InputError(
            "labels",
            expected="no labels with a prompt that is pruned",
            found="labels of all its tokens, more than it has logits",
            fix="Compute the loss from the logits of the text after the image "
            "(logits_to_keep), or call vtprune_fx.undo(model).",
        )


def check_states(named: Mapping[str, object]) -> None:
    """Refuse states of a prompt that comes with candidates for its answer.

    Raises:
        InputError: Hidden states are asked for.
    """
    if named.get("output_hidden_states"):
        raise InputError(
            "output_hidden_states",
            expected="False with an assistant",
            found="True",
            fix="A prompt and the candidates run one after the other, and the prompt's "
            f"layers differ in length. {_UNDO}",
        )


def check_later_images(model: PreTrainedModel, named: Mapping[str, object]) -> None:
    """Refuse images on a filled cache that depend on what came before them.

    Args:
        model: The model.
        named: Its arguments, images among them.

    Raises:
        InputError: Images attend to all of their tokens, or are placed along several
            axes that only the complete conversation determines.
    """
    why = None
    if named.get("token_type_ids") is not None:
        why = "an image whose tokens attend to later ones, which the cache's mask hides"
    if named.get("position_ids") is None and hasattr(
        model.base_model, "compute_3d_position_ids"
    ):
        why = "an image without position_ids, which the model counts along several axes"
    if why is not None:
        raise InputError(
            f"later turn of {type(model).__name__}",
            expected="text alone on a filled cache",
            found=why,
            fix="Start from an empty cache, with the conversation from its start.",
        )


def check_features(
    model: PreTrainedModel, features: Mapping[str, object], ids: Tensor | None
) -> None:
    """Refuse encoded images that do not fit the placeholders.

    Args:
        model: The model.
        features: What its encoders gave, by kind.
        ids: [B, Q], the new tokens; None where embeddings are given.

    Raises:
        InputError: There is another number of features.
    """
    width = model.config.get_text_config().hidden_size
    for kind, encoded in features.items():
        token = getattr(model.config, f"{kind}_token_id", None)
        if token is None or ids is None:
            continue
        each = pytree.tree_leaves(getattr(encoded, "pooler_output", None))
        came = sum(n.numel() for n in each if isinstance(n, Tensor)) // width
        places = int((ids == token).sum())
        if came != places:
            raise mismatch(f"{came} features for {places} placeholders")


def schedule_for(
    model: PreTrainedModel, places: Recipe | None, asked: Recipe | str | float
) -> Recipe:
    """The recipe with which prompts run that are asked to drop other numbers.

    Args:
        model: The model.
        places: Cuts that its graphs have; None where their numbers are fixed.
        asked: A recipe, what ``load_recipe`` takes, or a budget.

    Raises:
        InputError: The graphs have no such cuts, or their numbers are fixed.
        RecipeError: The recipe cannot be loaded.
    """
    if places is None:
        raise InputError(
            f"schedule of {type(model).__name__}",
            expected="a model compiled with a recipe of counts or shares, that makes "
            "no new tokens, and without a mode",
            found="one whose numbers are part of its graphs, or follow its attention",
            fix="Call vtprune_fx.undo(model), and compile the model with the recipe "
            "that it should run with.",
        )
    if asked == 0:
        return places.keep_all()  # in decoders, too, whose costs are not counted
    if isinstance(asked, (int, float)):
        return scaled(places, asked, Geometry.from_config(model.config))
    recipe = load_recipe(asked)
    check_same_places(places, recipe)
    return recipe


_REFUSED_OPTIONS = {
    "prefill_chunk_size": "Each part of a prompt would be pruned by itself.",
    "assistant_early_exit": "The model would run without its last layers.",
}


def check_generation(config: object, options: Mapping[str, object]) -> None:
    """Refuse ways to generate that a pruned prompt cannot serve.

    Args:
        config: The ``GenerationConfig`` that ``generate`` will use.
        options: Keyword arguments of ``generate``, which come before it.

    Raises:
        InputError: One is asked for.
    """

    def asked(name: str) -> object:
        return options.get(name, getattr(config, name, None))

    for name, why in _REFUSED_OPTIONS.items():
        if asked(name) is not None:
            raise InputError(
                name,
                expected="None",
                found=f"{asked(name)}, which a pruned model cannot generate with",
                fix=f"{why} {_UNDO}",
            )
    if asked("use_cache") is False:
        raise InputError(
            "use_cache",
            expected="True",
            found="False, which a pruned model cannot generate with",
            fix=f"A prompt grown by an answer is another prompt. {_UNDO}",
        )
