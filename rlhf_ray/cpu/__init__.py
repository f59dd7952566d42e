"""Faster loops for CPUs, in C and by hand, and the layers that use them.
Without this package torch's own operations do the work.

May import: generation.
Heavy packages: transformers.
"""
