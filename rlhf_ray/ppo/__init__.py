"""PPO without Ray. `single_process` is the whole of it on one page; `step` is one iteration over roles, `gates` what
stops it, `loop` the iterations, `ahead` generation ahead of training, `checkpoint` what a run goes on from,
`stage_end` what it ends with.

May import: errors, messages, config, algorithms, runs, models, data, training, rewards, roles.
"""
