"""What people said of the models' answers: stored once each, summed up, and read as preference pairs.

May import: errors, config, runs, algorithms.
Heavy packages: sqlalchemy.
"""
