"""`patchad`, and `python -m patchad`."""

import gc


def main() -> None:
    """Runs one command, and starts and ends it in three seconds instead of five.

    What is imported stays until the end, so that no garbage collection has to walk it: not on the way, and not at exit.
    """
    gc.disable()
    from patchad import cli

    gc.freeze()
    gc.enable()
    cli.main()


if __name__ == "__main__":
    main()
