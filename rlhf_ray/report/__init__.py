"""The HTML report of a run, and the pages of results/.
They show what a run folder holds and compute no figure of their own.

May import: errors, tables, config, runs, models, evaluation, rounds.
"""
