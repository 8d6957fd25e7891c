"""One rank of test_linear_parallel: its rows of the head, and the whole computed alone beside it."""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import nca_kernels


def main(rank, ranks, store):
    os.environ["NCA_KERNELS_TILE_BYTES"] = "20000"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{store}")
    torch.manual_seed(0)
    V, D = 203, 16
    hidden, weight, bias, labels = torch.randn(2, 19, D), torch.randn(V, D), torch.randn(V), torch.randint(V, (2, 19))
    labels[0, :6] = -100
    upstream = torch.linspace(-1, 2, 38).view(2, 19)
    bounds = [0, *(V * (r + 1) ** 2 // ranks**2 for r in range(ranks))]  # uneven slices
    rows = slice(bounds[rank], bounds[rank + 1])
    for frozen in (True, False):
        for scale, softcap in ((1.0, None), (0.5, 3.0)):
            options = {"scale": scale, "softcap": softcap, "backend": "cpu"}
            h, w, b = hidden.clone().requires_grad_(), weight.clone(), bias.clone()
            h1, w1, b1 = hidden.clone().requires_grad_(), weight[rows].clone(), bias[rows].clone()
            if not frozen:
                _ = [t.requires_grad_() for t in (w, b, w1, b1)]
            whole = nca_kernels.linear_token_logps(h, w, labels, bias=b, **options)
            share = nca_kernels.linear_token_logps(h1, w1, labels, bias=b1, tp_group=dist.group.WORLD, **options)
            whole.backward(upstream)
            share.backward(upstream)
            torch.testing.assert_close(share, whole, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(h1.grad, h.grad, rtol=1e-4, atol=1e-5)
            if not frozen:
                torch.testing.assert_close(w1.grad, w.grad[rows], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(b1.grad, b.grad[rows], rtol=1e-4, atol=1e-5)
            for tensor in (share.detach(), h1.grad):  # the same bits on every rank
                everyone = [torch.empty_like(tensor) for _ in range(ranks)]
                dist.all_gather(everyone, tensor.contiguous())
                assert all(torch.equal(tensor, other) for other in everyone)
    sharded = distribute_tensor(weight, init_device_mesh("cpu", (ranks,)), [Shard(0)])
    ours = nca_kernels.linear_token_logps(hidden, sharded, labels, backend="cpu")
    torch.testing.assert_close(ours, nca_kernels.linear_token_logps(hidden, weight, labels, backend="cpu"), rtol=1e-5, atol=1e-5)
    try:
        replicated = DTensor.from_local(weight, init_device_mesh("cpu", (ranks,)), [Replicate()])
        nca_kernels.linear_token_logps(hidden, replicated, labels)
    except ValueError as error:
        assert "weight: got a DTensor" in str(error) and "full_tensor" in str(error)
    else:
        raise AssertionError("a replicated DTensor was not refused")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
