"""The command `python -m bbkit.benchmark`, which bbkit.study.benchmark is."""

from bbkit.study.benchmark import main

if __name__ == "__main__":
    import sys

    sys.exit(main())
