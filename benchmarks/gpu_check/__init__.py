"""`python3 -m benchmarks.gpu_check`: everything that one GPU can answer about dist_gpt, in one run of ten minutes.

__main__.py       options, sections in turn, exit code
packages.py       packages that are missing, and wheels that a folder brings
device.py         what a section asks of a GPU; a stand-in on the CPU answers for tests
results.py        results.json and results.md
cases.py          the configurations that are trained
pretended.py      training steps on a device that torch only pretends
"""
