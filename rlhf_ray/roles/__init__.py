"""The roles of PPO as plain classes: generator, reward, reference, trainer, and the experience made from their results.
An actor is a thin shell around one.

May import: errors, messages, tables, config, algorithms, models, data, generation, training, rewards.
"""
