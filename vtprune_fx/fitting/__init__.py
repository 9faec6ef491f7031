"""Recipes fitted to a model on calibration prompts."""
