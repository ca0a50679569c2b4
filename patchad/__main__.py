"""`patchad`, and `python -m patchad`."""

import gc


def main() -> None:
    """Runs one command, and starts and ends it sooner than an import alone would.

    What is imported stays until the end, so that no garbage collection has to walk it: not on the way, and not at exit.
    """
    gc.disable()
    from patchad import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
