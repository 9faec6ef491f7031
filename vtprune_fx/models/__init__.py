"""What vtprune knows of transformers, and opening models."""
