"""The run folder and what happens in it, stage by stage: pipeline, resume, events, metrics.

May import: errors, tables, config.
"""
