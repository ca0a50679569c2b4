"""`patchad`, and `python -m patchad`."""

import gc
import sys
from importlib.metadata import version
from importlib.util import find_spec


def main() -> None:
    """Runs one command, and starts and ends it sooner than an import alone would.

    What is imported stays until the end, so that no garbage collection has to walk it: not on the way, and not at exit.
    """
    if sys.argv[1:] == ["--version"]:
        print(versions())
        return
    gc.disable()
    from patchad import cli

    gc.freeze()
    gc.enable()
    cli.main()


def versions() -> str:
    """Of patchad, and of torch and Lightning where they are installed, in one line; imports none of them."""
    others = [name for name in ("torch", "pytorch_lightning") if find_spec(name)]
    return ", ".join(f"{name} {version(name)}" for name in ("patchad", *others))


if __name__ == "__main__":
    main()
