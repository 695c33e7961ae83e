"""The command `python -m bbkit.probe`: noise and interference of the gradients at a state of a run; in bbkit.study.probe."""

from bbkit.study.probe import main

if __name__ == "__main__":
    import sys

    sys.exit(main())
