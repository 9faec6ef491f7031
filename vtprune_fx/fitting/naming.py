"""Name and provenance of a fitted recipe."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from vtprune_fx.fitting.calibration import Calibration
from vtprune_fx.fitting.options import Fitted, Options
from vtprune_fx.recipes.schema import Provenance


def named(fitted: Fitted, options: Options, calibration: Calibration) -> Fitted:
    """A fitted recipe with its name and provenance."""
    provenance = Provenance(
        source=options.command,
        model=options.model,
        note=_note(fitted, options, calibration),
    )
    changes = {"name": _name(fitted.budget, options), "provenance": provenance}
    return dataclasses.replace(fitted, recipe=fitted.recipe.model_copy(update=changes))


def _name(budget: float, options: Options) -> str:
    """``fitprune-MODEL-60``, and the options that differ from the defaults."""
    model = re.sub(r"[^a-z0-9.]+", "-", Path(options.model).name.lower())
    parts = ["fitprune", model.strip("-."), f"{100 * budget:g}"]
    parts += ["visual"] * (options.count == "visual")
    parts += ["exact"] * options.exact
    parts += [options.latency] if options.latency else []
    if options.max_cuts is not None:
        parts.append(f"{options.max_cuts}-cuts")
    return "-".join(filter(None, parts))


def _note(fitted: Fitted, options: Options, calibration: Calibration) -> str:
    mode = "exact search" if options.exact else "from statistics"
    of = f"the prefill MACs of {options.count} tokens"
    if fitted.saved_time is not None:
        of = f"the time to the first token with {options.latency}"
    note = (
        f"Alpha {fitted.tolerance:.4f}, {mode}; budget {fitted.budget:.1%} of "
        f"{of}, reached {fitted.saved:.1%} of the MACs of all and "
        f"{fitted.saved_visual:.1%} of those of visual tokens; "
        f"{len(calibration)} samples of {calibration.name}."
    )
    if fitted.saved_time is not None:
        note += f" Measured: {fitted.saved_time:.1%} of the time saved."
    if fitted.kept != fitted.kept_before:
        note += (
            f" Cuts merged: {fitted.kept:.1%} of the attention kept instead of "
            f"{fitted.kept_before:.1%}."
        )
    return note
