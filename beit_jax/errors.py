"""The one exception for problems that the user can mend."""


class UserError(Exception):
    """One sentence that says what is wrong, where, and what to do.

    Commands print it without a traceback and exit with status 1; every other exception is a bug.
    """
