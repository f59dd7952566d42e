"""Passes over a model with a gradient: the DeepSpeed engine, forward passes, packing, precision, ranks.

May import: errors, messages, tables, algorithms, models.
Heavy packages: deepspeed, torch.distributed, transformers.
"""
