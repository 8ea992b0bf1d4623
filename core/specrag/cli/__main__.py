"""``python -m specrag.cli``: the ``specrag`` command without its script."""

from specrag.cli import main

if __name__ == "__main__":
    main()
