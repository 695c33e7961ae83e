"""The command `python -m bbkit.benchmark`: what the gradients and retention cost beside plain TRL; in bbkit.study.benchmark."""

from bbkit.study.benchmark import main

if __name__ == "__main__":
    import sys

    sys.exit(main())
