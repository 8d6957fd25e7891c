import os
import sys

from . import _compat
from .cli import main

status = main()
distributed = getattr(sys.modules.get("torch"), "distributed", None)
if status == 0 and distributed is not None and distributed.is_initialized() and distributed.get_backend() == "gloo":
    # PyTorch 2.13 now and then ends in std::terminate over gloo's threads at the interpreter's exit (4 of 96 processes that did
    # nothing but DDP or FSDP2), and the launcher then stops the other ranks. So all of them get here, and leave without it.
    distributed.barrier()
    _compat.run_exit_functions()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
sys.exit(status)
