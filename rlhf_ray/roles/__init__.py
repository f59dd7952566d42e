"""The roles of PPO as plain classes: generator, reward, reference, trainer, and the experience made of what they say.
An actor is a thin shell around one.

May import: tables, messages, config, algorithms, models, data, cpu, generation, training, rewards.
"""
