"""Reading and editing fx graphs."""
