"""Pipeline schedules: the order of actions on every rank.

    orders.py    what each rank computes, in which order (a new schedule is one function here)
    lower.py     adds what it sends and receives, the gradient reductions and the optimizer step
    check.py     proves the result complete and free of deadlock
    simulate.py  says how long it takes and how much of it is bubble
    draw.py      draws it as text

The list that is executed is the list that was checked, simulated and drawn. No torch is imported here.
"""
