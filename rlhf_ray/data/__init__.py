"""Turns rows of text from any source into the run folder's Parquet files.

May import: errors, config, runs, models, votes.
Heavy packages: transformers.
"""
