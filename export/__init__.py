"""Writing pruned models for other runtimes, and running what was written."""

if __name__ != "vtprune_fx.export":
    raise ImportError("import vtprune_fx.export: a bare `export` makes second classes")
