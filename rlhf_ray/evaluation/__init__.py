"""The evaluation stage: SFT model against the tuned ones on held-out prompts, each figure with its interval, and the verdict.

May import: errors, messages, tables, config, algorithms, runs, models, data, generation, training, rewards, roles,
supervised.
"""
