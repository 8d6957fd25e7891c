"""model_logps of models inside DDP and FSDP2, on two gloo processes."""

import os
import socket

import pytest
import torch
from architectures import batch, tiny
from test_heads import own_logps, values_and_grads

from nca_kernels.integrations.models.heads import model_logps

pytestmark = pytest.mark.usefixtures("default_dispatch")


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def distributed_worker(rank, world, port, failures):
    torch.set_num_threads(1)
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    distributed.init_process_group("gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=world)
    inputs = tuple(tensor[rank : rank + 1] for tensor in batch())
    upstream = torch.randn(1, 9, generator=torch.Generator().manual_seed(rank))

    def step(model, function):
        logps, grads = values_and_grads(function, model, inputs, upstream)
        whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g  # noqa: E731
        return logps, {name.removeprefix("module."): whole(grad) for name, grad in grads.items()}

    def sharded(name="gemma2", head_apart=True, **head_options):
        model = tiny(name, tie_word_embeddings=not head_apart)
        for layer in model.model.layers:
            fully_shard(layer)
        if head_apart:
            fully_shard(model.lm_head, **head_options)
        return fully_shard(model, reshard_after_forward=True)

    for name, make in [
        ("gemma2", lambda: DistributedDataParallel(tiny("gemma2"))),
        ("gemma2", lambda: sharded(head_apart=False)),
        ("gemma2", sharded),
        # What leaves the head is rounded to bfloat16; the log-probs must not be.
        ("llama", lambda: sharded("llama", mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))),
    ]:
        ours, ours_grads = step(make(), model_logps)
        plain = tiny(name, tie_word_embeddings="lm_head.weight" not in ours_grads)
        wanted, grads = step(plain, own_logps)
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
        assert ours_grads.keys() == grads.keys()
        for name, grad in grads.items():
            distributed.all_reduce(grad)
            torch.testing.assert_close(ours_grads[name], grad / world, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    distributed.destroy_process_group()
    os._exit(0)  # as in linear_worker.py: not through gloo's threads


def test_fsdp2_and_ddp():
    torch.multiprocessing.spawn(distributed_worker, (2, free_port(), None), nprocs=2)
