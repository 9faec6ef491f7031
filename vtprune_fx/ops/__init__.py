"""Operators of vtprune, and what they compute on each device."""
