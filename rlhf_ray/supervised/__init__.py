"""The supervised stages on TRL's trainers: SFT, reward model, DPO. One worker's work; `actors.supervised` starts the workers.

May import: errors, messages, tables, config, algorithms, runs, models, data, training, rewards, roles.
Heavy packages: transformers, trl.
"""
