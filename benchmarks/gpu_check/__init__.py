"""`python3 -m benchmarks.gpu_check`: check all of dist_gpt that one GPU can exercise, in ten minutes.

__main__.py       options, sections in turn, exit code
packages.py       missing packages, and a folder of wheels in their place
device.py         the GPU as sections see it; tests use a stand-in on the CPU
results.py        results.json and results.md
cases.py          the configurations that are trained
pretended.py      training steps on torch's fake (pretended) device, without hardware
"""
