"""Measurements of speed and memory, each a program of its own.

The unit is images per second of CPU time, with one thread: what one core, and so every worker of a training run, turns
from files into batches. CPU time, because other programs on the machine then count less; waiting for a disk or a
network is left out. All sides of a comparison are measured in the same run, in turns, so that a core that slows down
slows all of them; a figure is the median of its turns, printed with the slowest and the fastest.

Run ``python -m lightning_igpt.benchmarks.data`` (two to three minutes), or the same with ``--quick`` (half a minute,
a first impression). The last line is one JSON object. What is worth keeping goes to ``docs/benchmarks``.
"""
