"""The command line. A command parses, calls and prints; what it does is a function of another package.

May import: errors, tables, config, runs, models, data, generation, training, ppo, evaluation, report,
votes, actors, publish, rounds, serving, bench.
Heavy packages: rich, typer.
"""
