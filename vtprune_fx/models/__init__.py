"""What vtprune knows of transformers, and opening models."""

from vtprune_fx.models.loading import load_processor, open_checkpoint
from vtprune_fx.models.pictures import open_image
from vtprune_fx.models.prompts import batch_inputs, continued, prompt_inputs

__all__ = [
    "batch_inputs",
    "continued",
    "load_processor",
    "open_checkpoint",
    "open_image",
    "prompt_inputs",
]
