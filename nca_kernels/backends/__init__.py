"""The backends, in the order in which ``backend=None`` tries them. A new one is a module of these functions and a line here.

Each offers ``NAME``, ``unsupported(op, device, dtype, loss) -> list of reasons`` and, writing into tensors that it is given,
``token_logps_fwd``, ``token_logps_bwd`` and ``group_loss_fwd`` (see :mod:`nca_kernels.ops` for their meaning). The last,
``torch``, has no kernels: the public functions call :mod:`nca_kernels.reference` for it.

``cuda`` comes before ``triton``: its backward takes 12 instructions an element against 26, and a call 3 us of Python against 11
to 16 (docs/tuning.md). Where the extension was not built, Triton needs no compiler but its own.
"""

from . import native, pytorch, triton

BACKENDS = {backend.NAME: backend for backend in (native.cuda, triton, native.cpu, pytorch)}
