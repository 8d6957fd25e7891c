"""Benchmarks side by side: this package, plain PyTorch and the peers, in one run.

``python -m bench logps|group|linear|step|tune [--device cpu|cuda] [--quick] [--out DIR]`` prints a table and stores JSON;
``numerics`` stores errors in place of times. ``summary`` prints a line for each stored problem, ``plot`` draws them. A suite
(``logps.py``, ``group.py``, ...) lists problems and implementations; ``measure.py`` has the one timer, ``schema.py`` the one
format and table. ``gpu.sh`` runs everything that needs a GPU.
"""
