"""What scores a response: reward models, ensembles, several rewards, the user's functions in processes of their own.

May import: errors, messages, tables, config, algorithms, runs, models, data, training.
"""
