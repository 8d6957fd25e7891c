"""Each private name of other packages that `nca_kernels/_compat.py` uses exists and does what this package needs."""

import ast
import copy
import inspect
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import nca_kernels
from nca_kernels import _compat

PACKAGE = Path(nca_kernels.__file__).parent


def use(function, *arguments):
    """Call the function; if the private name is gone, fail with a message that says what breaks without it."""
    try:
        return function(*arguments)
    except (AttributeError, ImportError) as error:
        without = " ".join(inspect.getdoc(function).split("Without it, ")[1].split())
        pytest.fail(f"_compat.{function.__name__}: {error}. Without it, {without}")


def test_exit_functions_run_before_a_hard_exit():
    script = (
        "import atexit, os; from nca_kernels import _compat; "
        "atexit.register(print, 'cleaned up', flush=True); _compat.run_exit_functions(); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "cleaned up\n", done.stderr


def test_below_autograd_records_no_graph():
    x = torch.ones(3, requires_grad=True)
    with use(_compat.below_autograd):
        assert not (2 * x).requires_grad
    assert (2 * x).requires_grad


def test_function_transforms_are_seen():
    seen = []
    torch.func.grad(lambda x: (seen.append(use(_compat.function_transforms_active)), x.sum())[1])(torch.ones(2))
    assert seen == [True] and use(_compat.function_transforms_active) is False


def test_the_compiler_takes_the_result_for_a_constant():
    calls = []

    def answer():
        calls.append(time.sleep(0))  # traced, the call of a C function would break the graph
        return 3

    use(_compat.constant_in_graphs, answer)
    compiled = torch.compile(lambda x: x + answer(), backend="eager", fullgraph=True)
    assert compiled(torch.ones(1)) == 4 and compiled(torch.ones(1)) == 4
    assert len(calls) == 1


def test_fake_tensors_are_told_from_others():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert use(_compat.is_fake, torch.ones(2))
    assert not use(_compat.is_fake, torch.ones(2))


def test_a_false_condition_in_a_graph_raises():
    use(_compat.assert_in_graph, torch.tensor(True), "is true")
    with pytest.raises(RuntimeError, match="is false"):
        use(_compat.assert_in_graph, torch.tensor(False), "is false")


def test_tensors_under_vmap_are_told_from_others():
    seen = []

    def look(x, y):
        seen.append((use(_compat.is_batched, x), use(_compat.is_batched, y)))
        return x.sum() + y.sum()

    torch.vmap(torch.func.grad(look), in_dims=(0, None))(torch.ones(2, 3), torch.ones(3))
    torch.func.grad(look)(torch.ones(3), torch.ones(3))
    assert seen == [(True, False), (False, False)] and not use(_compat.is_batched, torch.ones(2))


def test_users_of_a_tensors_memory_are_counted():
    whole = torch.ones(2, 3, requires_grad=True) * 1
    unknown = not _compat.counts_storage_users  # what cannot be counted may be shared
    assert use(_compat.shares_storage, whole) == use(_compat.shares_storage, whole[:, :2]) == unknown
    another = whole.detach()
    assert use(_compat.shares_storage, whole) and another.shape == whole.shape


class Saving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return 2 * x


def test_outputs_saved_under_hooks_are_told_from_others():
    x = torch.ones(2, 3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        hooked = (torch.tanh(x), torch.softmax(x, -1), Saving.apply(x))
    assert all(use(_compat.saved_under_hooks, tensor.grad_fn) for tensor in hooked)
    assert not any(use(_compat.saved_under_hooks, tensor.grad_fn) for tensor in (torch.tanh(x), Saving.apply(x), x * 1, x))
    assert use(_compat.view_base, x[:, :2]) is x and use(_compat.view_base, x) is None


def test_a_process_group_is_found_by_name(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        assert use(_compat.process_group, group.group_name) is group
    finally:
        dist.destroy_process_group()


def test_compiled_modules_are_told_from_others():
    module = nn.Linear(2, 2)
    assert not use(_compat.is_compiled, module)
    module.compile(backend="eager")
    assert use(_compat.is_compiled, module)


def test_the_layers_own_forward_is_found_under_accelerates():
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is not installed")
    module = nn.Linear(2, 2)
    assert use(_compat.forward_attribute, module) == "forward"
    hooks.add_hook_to_module(module, hooks.ModelHook())
    assert getattr(module, use(_compat.forward_attribute, module)).__func__ is nn.Linear.forward


def test_the_attention_of_a_model_is_known():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from architectures import tiny

    model = tiny("llama")
    for name in ("eager", "sdpa"):
        config = copy.deepcopy(model.config)
        config._attn_implementation = name
        model = transformers.AutoModelForCausalLM.from_config(config)
        assert use(_compat.attention_implementation, model.config) == name
    assert not use(_compat.is_stateful, model)
    assert use(_compat.is_stateful, tiny("mamba"))


def test_a_trainers_checkpoints(tmp_path):
    from transformers import Trainer, TrainingArguments

    for name in ("_get_output_dir", "_save_checkpoint", "_push_from_checkpoint"):
        assert hasattr(Trainer, name), f"transformers' Trainer has no {name}: a killed run leaves half checkpoints"
    trainer = Trainer(nn.Linear(1, 1), TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", hub_strategy="end"))
    assert use(_compat.run_folder, trainer, None) == str(tmp_path)
    trainer.create_optimizer_and_scheduler(1)
    use(_compat.save_checkpoint, trainer, trainer.model, None)
    assert (tmp_path / "checkpoint-0" / "trainer_state.json").exists()
    use(_compat.push_checkpoint, trainer, str(tmp_path / "checkpoint-0"))  # nothing, by hub_strategy


def test_an_adapter_that_transformers_injects_is_seen():
    from architectures import tiny
    from peft import LoraConfig

    model = tiny("llama")
    assert not use(_compat.has_injected_adapter, model)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert use(_compat.has_injected_adapter, model)


def test_the_device_of_accelerates_hooks():
    from accelerate import cpu_offload

    module = nn.Sequential(nn.Linear(1, 1))
    assert use(_compat.execution_device, module[0]) is None
    cpu_offload(module, torch.device("cpu"))
    assert use(_compat.execution_device, module[0]) == torch.device("cpu")


def _private_names(path):
    """The names with one leading underscore that a file uses from other packages."""
    tree = ast.parse(path.read_text())
    stores = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    own = {node.attr for node in stores if getattr(node.value, "id", "") == "self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            continue
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            names = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
        yield from (name for name in names if name.startswith("_") and not name.startswith("__") and name not in {*KNOWN, *own})


# Public in all but name: namedtuple documents its own with an underscore, as are os._exit and argparse's type; a trainer of
# transformers overrides `_get_train_sampler` and `_get_eval_sampler` (test_trainer_lengths.py fails if they are not called).
KNOWN = {"_get_train_sampler", "_get_eval_sampler", "_fields", "_asdict", "_replace", "_make", "_exit", "_SubParsersAction"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_private_names_live_in_one_file(path):
    if path.name != "_compat.py":
        assert not list(_private_names(path))
