import os
import sys

from . import _compat
from .cli import main

status = main()
distributed = getattr(sys.modules.get("torch"), "distributed", None)
if status == 0 and distributed is not None and distributed.is_initialized() and distributed.get_backend() == "gloo":
    # At the interpreter's exit, PyTorch 2.13 sometimes calls std::terminate because of gloo's threads (4 of 96 processes that only
    # ran DDP or FSDP2), and the launcher then stops the other ranks. So all ranks wait here, and exit without that cleanup.
    distributed.barrier()
    _compat.run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
sys.exit(status)
