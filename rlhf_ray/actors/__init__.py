"""Ray, and Ray only: the session, placement, role actors and their groups, calls, waits, recovery, weight transports,
the PPO stage, the launcher of the supervised stages, jobs on a cluster. What an actor computes is a plain class in another package.

May import: errors, messages, tables, config, runs, models, data, training, rewards, roles, ppo, supervised,
evaluation, report, forking, publish.
Heavy packages: ray.
"""
