"""Operators of vtprune's own, and what they compute on each device."""
