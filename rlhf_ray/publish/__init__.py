"""A version of a model for a server that runs: its files, what training says of it, and where servers are on this machine.

May import: errors, config, runs, models, training.
"""
