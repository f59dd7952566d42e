"""Benchmarks as ratios against yardsticks, and the cost model they are held against.
`cli/bench.py` has the commands.

May import: errors, messages, config, algorithms, runs, models, data, generation, training, rewards, roles, ppo, supervised,
actors, serving.
Heavy packages: peft, ray, rich, transformers, trl, vllm.
"""
