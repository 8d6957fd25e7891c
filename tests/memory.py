"""Peak extra memory of a call, measured: the allocator's on a GPU, the process's resident set on the CPU."""

import gc

import torch


def peak_extra_bytes(call, device):
    """The most memory that ``call`` held beyond what stood before it, its result included."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    # The kernel's own high-water mark of the resident set, reset by hand: it also sees what C++ allocates.
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = _status("VmRSS")
    result = call()
    del result
    return _status("VmHWM") - before


def _status(field):
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
