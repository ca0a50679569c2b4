"""The one error that a user can mend."""


class PatchadError(ValueError):
    """Something that the user can mend: the command line prints it as one line and exits with 2."""
