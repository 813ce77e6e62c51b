"""`python3 -m benchmarks.gpu_check`: check everything about dist_gpt that one GPU can show, in ten minutes.

__main__.py       options, sections in turn, exit code
packages.py       missing packages, and a folder of wheels in their place
device.py         the GPU as sections see it; tests use a stand-in on the CPU
results.py        results.json and results.md
cases.py          the configurations that are trained
pretended.py      training steps on a pretended device of torch, without hardware
"""
