"""The two kinds of failure that the command line tells apart."""


class UserError(ValueError):
    """A user's mistake: one sentence with the value and the remedy; the command exits with code 2 and no traceback."""


class StageStopped(Exception):
    """A stage ended early because it was asked to (Ctrl-C); its checkpoint is written. The command exits with 130."""
