"""Tokenizers and models: built, loaded, saved."""
