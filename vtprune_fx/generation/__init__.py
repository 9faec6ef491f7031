"""A model whose prompts are pruned, ready for ``model.generate``."""
