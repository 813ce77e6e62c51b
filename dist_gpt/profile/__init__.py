"""What a run measures of itself, and writes as events: the window, memory, products alone, the device.

recorder.py       around every training step; opens and closes the profiling window
memory.py         one step's bytes by category, beside the plan's
kernels.py        the rank's products measured alone, and what the device can do at most
device.py         clocks and power of a GPU
torch_trace.py    torch.profiler over the window, on chosen ranks
"""
