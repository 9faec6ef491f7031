"""A recipe placed on a graph: what the passes carry out. Pure data."""
