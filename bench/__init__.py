"""Benchmarks of this package, plain PyTorch and other packages, side by side in one run.

``python -m bench logps|group|linear|step|tune [--device cpu|cuda] [--quick] [--out DIR]`` prints a table and stores JSON;
``numerics`` stores errors, not times. ``summary`` prints a line for each stored problem, and ``plot`` draws them. A suite
(``logps.py``, ``group.py``, ...) lists problems and implementations; ``measure.py`` has the timer, ``schema.py`` the
format and the table. ``gpu.sh`` runs everything that needs a GPU.
"""
