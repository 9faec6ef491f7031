"""Recipes: which visual tokens are dropped, where, and how many. Pure data."""
