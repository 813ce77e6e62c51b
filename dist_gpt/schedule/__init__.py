"""Pipeline schedules: the order of actions on every rank.

    orders.py    the compute actions of each rank, in order (a new schedule is one function here)
    lower.py     adds messages, gradient reductions and the optimizer step
    check.py     proves the result complete and free of deadlock
    simulate.py  computes how long it takes and how much of that is bubble
    draw.py      draws it as text
    expand.py    turns each action into steps, one per block

The executor runs the same list that was checked, simulated and drawn. No torch is imported here.
"""
