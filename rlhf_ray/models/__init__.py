"""Tokenizers and models: built, loaded, checked, saved; which part of them trains.

May import: errors, tables, config.
Heavy packages: accelerate, peft, transformers.
"""
