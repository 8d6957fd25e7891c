"""Benchmarks side by side: this package, plain PyTorch and the peers, in one run.

``python -m bench logps|group|linear [--device cpu|cuda] [--quick] [--out DIR]`` prints a table and stores JSON;
``python -m bench plot`` draws the stored JSON. A suite (``logps.py``, ``group.py``, ``linear.py``) lists problems and
implementations; ``measure.py`` has the one timer, ``schema.py`` the one format and table.
"""
