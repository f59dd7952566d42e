"""Tokenizers and models: built, loaded, checked, saved; which part of them trains.

May import: errors, config.
Heavy packages: peft, transformers.
"""
