"""Accuracy of a model, dense and pruned, against its cost."""
