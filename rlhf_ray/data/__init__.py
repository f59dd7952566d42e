"""Rows of text from anywhere to the run folder's Parquet files.

May import: errors, config, runs, models.
Heavy packages: transformers.
"""
