"""The two kinds of failure that the command line tells apart."""


class UserError(ValueError):
    """A user's mistake: one sentence with the value and the remedy; the command exits with code 2 and no traceback."""


class RunFailed(RuntimeError):
    """A machine or a process failed, not the user: one sentence with the cause; the command exits with code 1.

    The same command goes on from the last checkpoint.
    """

    process_must_end = False  # at once: a thread of it hangs in a library, which an orderly end would wait for


class NotFinite(RunFailed):
    """A score, a loss, a gradient or a weight became NaN or infinite. It reaches no update, no file and no generator.

    The same command goes on from the last checkpoint, whose numbers are finite.
    """


def machine_failed(what: str, error: Exception) -> RunFailed:
    """What to tell of a full disk, a folder that may not be written, a file server that is gone."""
    return RunFailed(f"{what} failed: {error}; make room or mend that, then run the same command again")


class StageStopped(Exception):
    """A stage ended early because it was asked to (Ctrl-C); its checkpoint is written. The command exits with 130."""
