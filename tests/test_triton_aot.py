"""Triton's kernels as machine code for GPUs that this machine need not have: no spills, 16-byte loads, no extra exponential.

They are compiled at the launch settings of V = 32000 and 128256 in a separate process, because with TRITON_INTERPRET=1 this process
holds interpreted functions.
"""

import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import nca_kernels
from nca_kernels.loss_table import LOSSES

# The GPU that the settings were made for, in every dtype at two vocabularies; the others in two dtypes at the longer one.
MAIN = 90
CAPABILITIES = (80, 89, MAIN, 100, 120)
VOCABULARIES = (32000, 128256)
LONG = VOCABULARIES[-1]
DTYPES = {"float32": ("fp32", 4), "bfloat16": ("bf16", 2), "float16": ("fp16", 2)}
POINTERS = {"labels": "*i64", "mask": "*i1", "desirable": "*i1"}  # the others are float32, or of the logits' dtype
FLOATS = ("inner", "softcap", "beta", "alpha", "label_smoothing", "nll_weight", "factor")
STRIDES = ("stride_n", "stride_t", "dstride_n", "dstride_t")
REGISTERS = 65536  # of a multiprocessor, on every one of these GPUs


def _fwd_cases(dtype, V, softcap):
    from nca_kernels.backends.triton import token_logps

    for has_moment in (False, True):
        launch = token_logps._fwd_launch(V, DTYPES[dtype][1], softcap, has_moment)
        yield "token_logps_fwd", dtype, {**launch, "HAS_SOFTCAP": softcap is not None, "HAS_MOMENT": has_moment}


def _bwd_cases(dtype, V, softcap, *absent):
    from nca_kernels.backends.triton import token_logps

    launch = {**token_logps._bwd_launch(V, DTYPES[dtype][1]), "HAS_SOFTCAP": softcap is not None}
    for names in ((), ("dlse", "dentropy"), *absent):
        yield "token_logps_bwd", dtype, {**launch, **dict.fromkeys(names), "ALIKE": True}


def _group_loss_cases(names):
    from nca_kernels.backends.triton import group_loss

    # A ragged batch with everything, and a full one with nothing.
    absent = dict.fromkeys(("mask", "lengths", "desirable", "baseline"))
    sizes = {name: (4, 64) if name in group_loss._COMPARING else (4,) for name in names}
    for name, K in ((name, K) for name, Ks in sizes.items() for K in Ks):
        launch = {**group_loss._launch(name, K), "LOSS": name}
        yield "group_loss_fwd", "float32", {**launch, "PAIRS": "best_vs_rest", "HAS_NLL": True, "TOTAL": True}
        yield "group_loss_fwd", "float32", {**launch, **absent, "PAIRS": "all", "HAS_NLL": False, "TOTAL": False}
    yield "group_loss_sum", "float32", {"BLOCK": 1024, "num_warps": group_loss._NUM_WARPS}


def _cases(capability):
    """``(name, dtype, launch settings and absent arguments)`` of every kernel to compile."""
    main = capability == MAIN
    for softcap in (None, 30.0):
        for dtype, V in itertools.product(DTYPES, VOCABULARIES) if main else [("float32", LONG), ("bfloat16", LONG)]:
            yield from _fwd_cases(dtype, V, softcap)
        for dtype in DTYPES if main else ("bfloat16",):
            yield from _bwd_cases(dtype, LONG, softcap, *([("dlse",), ("dentropy",)] if main else []))
    yield from _group_loss_cases(LOSSES if main else ("nca", "plackett_luce"))


def _compile(case):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    capability, name, dtype, launch, wide_strides = case
    module = importlib.import_module(f"nca_kernels.backends.triton.{name.rsplit('_', 1)[0]}")
    kernel = getattr(module, f"_{name}_kernel")
    constants = {key: value for key, value in launch.items() if key in kernel.arg_names}
    options = {key: value for key, value in launch.items() if key not in constants}
    signature, specialised = {}, []
    for param in kernel.params:
        if param.name in constants:
            if _version(triton) >= (3, 3):
                signature[param.name] = "constexpr"
        elif param.name in FLOATS:
            signature[param.name] = "fp32"
        elif param.name in module._POINTERS:
            element = DTYPES[dtype][0] if param.name in ("logits", "dlogits") else "fp32"
            signature[param.name] = POINTERS.get(param.name, f"*{element}")
            specialised += [] if param.do_not_specialize_on_alignment else [param.name]
        else:
            # A stride past 2^31 elements is an int64; which of them are makes no difference to what is asserted here.
            signature[param.name] = "i64" if wide_strides and param.name in STRIDES else "i32"
            specialised += [] if param.do_not_specialize else [param.name]
    compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options=options)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        run = {"check": True, "capture_output": True, "text": True}
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", cubin.name], **run).stdout
        # The instructions of group_loss are not asserted; those of the others are the same without the analysis of data flow.
        disassembled = name.startswith("token_logps")
        sass = subprocess.run([tools / "nvdisasm", "-c", "-ndf", cubin.name], **run).stdout if disassembled else ""
    return {
        "capability": capability,
        "name": name,
        "dtype": dtype,
        "launch": launch,
        "specialised": specialised,
        **{key.lower(): int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)},
        **{op: len(re.findall(rf"\b{op}\b", sass)) for op in ("LDG.E.128", "STG.E.128", "MUFU.EX2")},
        "in_flight": _in_flight(sass),
    }


def _in_flight(sass):
    """For each block of code with 16-byte loads, the number of loads that start before the first multiplication."""
    blocks = [re.findall(r"\b(LDG\.E\.128|FMUL2?)\b", block) for block in re.split(r"^\.L_x_\d+:", sass, flags=re.MULTILINE)]
    return [next(i for i, op in enumerate([*block, "FMUL"]) if op.startswith("FMUL")) for block in blocks if "LDG.E.128" in block]


def _version(triton):
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def _compile_all():
    import triton

    # ptxas knows sm_100 and sm_120 since Triton 3.3; that of 3.6 still puts 8 bytes of one forward kernel into local memory.
    capabilities = [c for c in CAPABILITIES if c < 100 or _version(triton) >= (3, 9)]
    cases = [(c, *case, False) for c in capabilities for case in _cases(c)]
    cases += [
        (c, name, dtype, {**launch, "ALIKE": False}, wide)
        for c, name, dtype, launch, wide in cases
        if (c, name, dtype) == (MAIN, "token_logps_bwd", "bfloat16")
    ]
    cases += [(MAIN, *case, True) for case in (*_fwd_cases("bfloat16", LONG, None), *_bwd_cases("bfloat16", LONG, None))]
    unique = {json.dumps(case): case for case in cases}.values()  # two vocabularies may share their settings
    with multiprocessing.Pool(2) as pool:
        return list(pool.imap_unordered(_compile, unique))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    spec = importlib.util.find_spec("triton")
    if spec is None:
        pytest.skip("Triton is not installed")
    if not (Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump").exists():
        pytest.skip("this Triton comes without cuobjdump")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton_cache"))
    env["PYTHONPATH"] = os.pathsep.join([str(Path(nca_kernels.__file__).parents[1]), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=CAPABILITIES)
def compiled(request, kernels):
    """The compiled kernels for one GPU."""
    here = [kernel for kernel in kernels if kernel["capability"] == request.param]
    if not here:
        pytest.skip(f"sm_{request.param} is asked of Triton 3.9 and later")
    return here


def _words(kernel):
    """The number of 16-byte words that a thread holds."""
    return kernel["launch"]["WORDS"] // (32 * kernel["launch"]["num_warps"])


def _named(compiled, name):
    found = [kernel for kernel in compiled if kernel["name"] == name]
    assert found
    return found


def test_nothing_spills(compiled):
    for kernel in compiled:
        assert kernel["stack"] == 0 and kernel["local"] == 0, kernel


def test_no_value_and_no_address_asks_for_a_recompile(compiled):
    for kernel in compiled:
        assert kernel["specialised"] == [], kernel


def test_two_programs_fit_a_multiprocessor(compiled):
    for kernel in compiled:
        # With a softcap arithmetic, not memory, is the limit of 16-bit logits.
        if not kernel["name"].startswith("group_loss") and not kernel["launch"]["HAS_SOFTCAP"]:
            registers = -(-kernel["reg"] // 8) * 8  # allotted by eights
            assert 2 * registers * 32 * kernel["launch"]["num_warps"] <= REGISTERS, kernel


def test_fwd_reads_16_bytes_at_a_time(compiled):
    # Whatever the row's alignment: none was promised to the compiler. Both loops count.
    for kernel in _named(compiled, "token_logps_fwd"):
        assert kernel["LDG.E.128"] == 2 * _words(kernel), kernel


def test_fwd_starts_all_loads_before_it_waits_for_one(compiled):
    for kernel in _named(compiled, "token_logps_fwd"):
        if not kernel["launch"]["HAS_SOFTCAP"]:
            assert kernel["in_flight"] == [_words(kernel)] * 2, kernel


def test_bwd_reads_and_writes_16_bytes_at_a_time(compiled):
    for kernel in _named(compiled, "token_logps_bwd"):
        assert kernel["LDG.E.128"] == _words(kernel), kernel
        assert kernel["STG.E.128"] == (_words(kernel) if kernel["launch"]["ALIKE"] else 0), kernel


def test_fwd_takes_one_exponential_an_element_and_one_a_word(compiled):
    for kernel in _named(compiled, "token_logps_fwd"):
        if not kernel["launch"]["HAS_SOFTCAP"]:
            words, per_word = _words(kernel), kernel["launch"]["VEC"] + 1
            assert kernel["MUFU.EX2"] == 2 * words * per_word + words, kernel  # two loops, and the end of the row


if __name__ == "__main__":
    json.dump(_compile_all(), sys.stdout)
