"""Measurements that a run takes of itself and writes as events: the window, memory, matmuls alone, the device.

recorder.py       records every training step; opens and closes the profiling window
memory.py         one step's bytes, in the categories of the plan
kernels.py        the rank's matmuls measured alone, and the peak rates of the device
device.py         clocks, power and temperature of a GPU
torch_trace.py    torch.profiler over the window, on chosen ranks
"""
