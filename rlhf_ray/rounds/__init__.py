"""Further rounds of training on people's votes: which comes next, its recipe, whether it is better, and what all came to.
No Ray: who trains is given.

May import: errors, config, algorithms, runs, votes, data, evaluation, publish.
"""
