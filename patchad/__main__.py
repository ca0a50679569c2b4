"""`patchad`, and `python -m patchad`."""

import gc
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec


def main() -> None:
    """Runs one command, and starts and ends it sooner than an import alone would.

    What is imported stays until the end, so that no garbage collection has to walk it: not on the way, and not at exit.
    """
    gc.disable()
    run = command(sys.argv[1:])
    gc.freeze()
    gc.enable()
    run()


def command(arguments: Sequence[str]) -> Callable[[], None]:
    """What runs a command: `patchad.line` those of exported files, `patchad.products`, which imports torch, all others.

    Where only patchad-runtime is installed, there is no `patchad.products`.
    """
    verb, value = [*arguments, "", ""][:2]
    if verb in ("score", "--version") or (verb == "benchmark" and not value.startswith("-")):
        from patchad.line import main
    else:
        try:
            from patchad.products import main
        except ModuleNotFoundError as error:
            if verb not in ("", "-h", "--help", "benchmark") or "--ckpt_path" in " ".join(arguments):
                missing = error.name if find_spec("torch") else "torch"
                hint = "pip install patchad; patchad-runtime has score and benchmark MODEL alone"
                print(f"patchad: error: patchad {verb} needs {missing}: {hint}", file=sys.stderr)
                sys.exit(2)
            from patchad.line import main
    return main


if __name__ == "__main__":
    main()
