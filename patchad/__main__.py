"""`python -m patchad`."""

from patchad.cli import main

if __name__ == "__main__":
    main()
