"""``python -m vtprune_fx.cli``: the ``vtprune`` command."""

from vtprune_fx.cli import main

if __name__ == "__main__":
    main()
