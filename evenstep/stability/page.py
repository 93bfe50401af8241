"""The page of the suite: what holds and what does not, from the outcomes of the cells.

Losses are compared with the best remedy of the same variant and seed (regret), and those of a fault with the remedy's
own undisturbed training (damage).
"""


def write(outcomes, scale, remedies, where, store):
    return []
