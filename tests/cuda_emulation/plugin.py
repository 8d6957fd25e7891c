"""``pytest -p cuda_emulation.plugin``: what runs on backend ``cpu`` runs the emulated CUDA kernels."""

import _cuda

from nca_kernels.backends import native

native.cpu._module = _cuda
