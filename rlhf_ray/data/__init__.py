"""Rows of text from anywhere to the run folder's Parquet files."""
