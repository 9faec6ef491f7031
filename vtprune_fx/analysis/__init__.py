"""Finding the parts of a traced model that pruning needs. Reads only."""
