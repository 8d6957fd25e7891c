"""The interface to C++: every field of a kernel's arguments is passed by name, and a wrong set of names is an error."""

import math
import random

import pytest
import torch

from nca_kernels.backends.native import cpu

pytestmark = pytest.mark.skipif(
    bool(reasons := cpu.unsupported("token_logps", torch.device("cpu"))), reason=f"backend cpu: {'; '.join(reasons)}"
)

LOGITS, LABELS = torch.tensor([0.0, math.log(3.0)]), torch.tensor([1])


def _arguments(logps, stats):
    null = dict.fromkeys(["dlogps", "dlse", "dentropy", "dlogits", "dstride_n", "dstride_t", "device", "stream"], 0)
    sizes = {"N": 1, "T": 1, "V": 2, "stride_n": 2, "stride_t": 2, "vocab_start": 0, "vocab_total": 2}
    tensors = {"logits": LOGITS.data_ptr(), "labels": LABELS.data_ptr(), "logps": logps.data_ptr(), "stats": stats.data_ptr()}
    constants = {"dtype": 0, "ignore_index": -100, "scale": 1.0, "softcap": 0.0, "stat_rows": 3, "threads": 1}
    return {**null, **sizes, **tensors, **constants}


def test_any_order_of_the_names_gives_the_same_result():
    for seed in range(5):
        logps, stats = torch.full((1,), torch.nan), torch.full((3,), torch.nan)
        items = list(_arguments(logps, stats).items())
        random.Random(seed).shuffle(items)
        assert cpu._module.token_logps_fwd(**dict(items)) == -1
        assert logps.item() == pytest.approx(math.log(0.75), rel=1e-6)
        assert stats.tolist() == pytest.approx([math.log(3.0), 4 / 3, math.log(3.0)], rel=1e-6)


@pytest.mark.parametrize("name", sorted(_arguments(torch.empty(1), torch.empty(3))))
def test_every_field_is_required(name):
    arguments = _arguments(torch.empty(1), torch.empty(3))
    del arguments[name]
    with pytest.raises(TypeError, match=f"^{name}: missing$"):
        cpu._module.token_logps_fwd(**arguments)


def test_wrong_names_and_values():
    logps = torch.full((1,), 7.0)
    arguments = _arguments(logps, torch.empty(3))
    with pytest.raises(TypeError, match="^stride_v: no such field$"):
        cpu._module.token_logps_fwd(**arguments, stride_v=1)
    with pytest.raises(TypeError, match="^got 1 positional arguments, wanted keyword arguments alone$"):
        cpu._module.token_logps_fwd(LOGITS.data_ptr())
    with pytest.raises(TypeError, match="^V: got 2.5, wanted a number of the field's type$"):
        cpu._module.token_logps_fwd(**{**arguments, "V": 2.5})
    with pytest.raises(TypeError, match="^scale: got None, wanted a number of the field's type$"):
        cpu._module.token_logps_fwd(**{**arguments, "scale": None})
    assert logps.item() == 7.0  # no kernel ran


def test_group_loss_is_checked_alike():
    with pytest.raises(TypeError, match="^name: missing$"):
        cpu._module.group_loss_fwd()
