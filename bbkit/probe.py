"""The command `python -m bbkit.probe`, which bbkit.study.probe is."""

from bbkit.study.probe import main

if __name__ == "__main__":
    import sys

    sys.exit(main())
