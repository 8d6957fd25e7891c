#!/usr/bin/env bash
# Everything that needs a GPU, without a network, in calls that end within 530 s, each with a summary last:
#   bash bench/gpu.sh --only doctor,tests,sanitize
#   bash bench/gpu.sh --only logps,linear,syncs,step,group,numerics
#   bash bench/gpu.sh --only tune
# The parts run in this order: what decides most comes first. Their times are shares of what a call has: fewer parts, more for
# each. Without --only: all but tune. The extension is always built first, unless that is done. A part that fails or cannot run
# does not stop the others.
#   --out DIR             the logs and the JSON go there, in place of out/gpu and bench/results/<device>; and DIR/gpu.tgz, one
#                         file that holds all of both that this call wrote
#   PYTHON                the interpreter (default: python3). Peers are whatever it imports: put wheels' folders on PYTHONPATH
#   NCA_KERNELS_REVISION  the revision that the JSON names where git does not know it
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # the package as it lies here, installed or not
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHON=${PYTHON:-python3} PYTHONUNBUFFERED=1
DEADLINE=500 # s; a part stopped there takes 10 more to end, the summary up to 20

PARTS=(build doctor tests sanitize logps linear syncs step group numerics tune)
declare -A share=(
  [doctor]=30 [tests]=240 [sanitize]=150 [logps]=180 [linear]=90 [syncs]=30 [group]=60 [step]=120 [numerics]=40 [tune]=300
)
declare -A needs=(
  [build]="nvcc" [tests]="gpu pytest" [sanitize]="gpu pytest compute-sanitizer" [step]="gpu transformers datasets peft accelerate"
  [syncs]="gpu transformers datasets peft accelerate"
)
only=doctor,tests,sanitize,logps,linear,syncs,step,group,numerics out=""
while (($#)); do
  case $1 in
    --only) only=${2:?--only wants parts} ;;
    --out) out=${2:?--out wants a folder} ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
  esac
  shift 2
done
IFS=, read -ra chosen <<<"$only"
for name in "${chosen[@]}"; do
  [[ " ${PARTS[*]} " == *" $name "* ]] || { echo "--only: got $name, wanted some of ${PARTS[*]}" >&2; exit 2; }
done
export logs=${out:-out/gpu} results=${out:-bench/results}
mkdir -p "$logs" "$results"
begun=$(mktemp)
trap 'rm "$begun"' EXIT

# --- what is missing, asked once: PyTorch takes seconds to start

declare -A missing status
while IFS=: read -r name reason; do
  missing[$name]=$reason
done < <(
  for tool in nvcc compute-sanitizer; do command -v "$tool" >/dev/null || echo "$tool:$tool is not on PATH"; done
  "$PYTHON" - <<'PY' || echo "gpu:$PYTHON does not run"
from importlib.util import find_spec

for name in ("pytest", "transformers", "datasets", "peft", "accelerate"):
    if find_spec(name) is None:
        print(f"{name}:{name} is not installed")
try:
    import torch

    if not torch.cuda.is_available():
        print("gpu:PyTorch sees no GPU")
except ImportError as error:
    print(f"gpu:PyTorch does not load ({error})")
PY
)
lacks() { # part: every reason why it cannot run
  local need reasons=""
  for need in ${needs[$1]:-gpu}; do reasons+="${missing[$need]:+; ${missing[$need]}}"; done
  echo "${reasons#; }"
}

# --- the parts

run_build() {
  local sources suffix
  sources=$(cat setup.py csrc/*.* csrc/*/* | cksum)
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  if [[ -f nca_kernels/_cuda$suffix && $sources == "$(cat build/built-from 2>/dev/null)" ]]; then
    echo "built already: nca_kernels/_cuda$suffix"
    return
  fi
  NCA_KERNELS_BUILD=cuda "$PYTHON" setup.py build_ext --inplace && echo "$sources" >build/built-from
}

run_doctor() { "$PYTHON" -m nca_kernels doctor; }

run_tests() {
  local workers=()
  # By file: the tests of large tensors, all in one, do not meet in the GPU's memory.
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8 --dist loadfile)
  # What runs on a GPU; the rest of the suite does not know whether there is one.
  "$PYTHON" -m pytest -q "${workers[@]}" --require-backend=triton,cuda \
    tests/test_{gpu,token_logps,row_stats,group_loss,linear,ops,memory,properties,bad_input,dispatch}.py
}

sanitized() { # log, tool, tests' -k: the kernels' tests under the tool, in the background
  # A timeout of its own: each tool ends before the part does, so that all are judged, and INT is heard in a background job.
  timeout --signal=INT --kill-after=5 $((limit - 10)) compute-sanitizer --tool "$2" "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/test_token_logps.py tests/test_row_stats.py tests/test_group_loss.py \
    -k "$3 and not (32000 or 50257 or 128256 or 151936 or 262144)" >"$logs/$1.log" 2>&1 &
}

run_sanitize() {
  local runs=(memcheck racecheck initcheck memcheck-triton) name failures=0 reports verdict
  # Without the cache each tensor is an allocation of its own, with bounds and a history that the tools know.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for name in memcheck racecheck initcheck; do sanitized "$name" "$name" cuda; done
  # Triton's kernels read whole 16-byte words, up to 14 bytes past a row, which only allocations of a multiple of 16 bytes cover:
  # the cache's are of 512 (tests/test_triton_launch.py shows that no word is without an element of the row).
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  sanitized memcheck-triton memcheck "triton and (stride or alignment or values or infinity or reference)"
  wait
  for name in "${runs[@]}"; do
    # PyTorch's own kernels are under the tool, too: only what names ours counts. The tools' lines begin with ====, pytest's
    # last with a number.
    reports=$(grep -cE '^=+ .*(token_logps|group_loss)_[a-z]+_kernel' "$logs/$name.log")
    verdict=$(grep -E '^[0-9]+ [a-z]+.* in [0-9.]+s|KeyboardInterrupt !' "$logs/$name.log" | tail -2 | paste -sd ' ')
    echo "$name: $reports reports on this package's kernels; ${verdict:-pytest did not end}"
    if ((reports)) || [[ ! $verdict =~ [0-9]+\ passed || $verdict =~ failed|error|Interrupt ]]; then
      failures=$((failures + 1))
      grep -A12 -m3 -E '^=+ .*(token_logps|group_loss)_[a-z]+_kernel' "$logs/$name.log" || tail -20 "$logs/$name.log"
    fi
  done
  return "$failures"
}

run_syncs() { "$PYTHON" -m bench.syncs; }

# One GPU: with several in sight transformers would take them all.
run_bench() { CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0} "$PYTHON" -m bench "$1" --device cuda --out "$results"; }
export -f run_build run_doctor run_tests sanitized run_sanitize run_syncs run_bench

part() { # name, seconds
  local name=$1 command code started=$SECONDS
  export limit=$(($2 > 1 ? $2 : 1)) # 0 would be none
  echo "=== $name, up to $limit s"
  command=run_$name
  [[ $(type -t "$command") == function ]] || command="run_bench $name"
  # INT, so that what is stopped says where it was: pytest its failures so far, Python its traceback.
  timeout --signal=INT --kill-after=10 "$limit" bash -c "$command" 2>&1 | tee "$logs/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) status[$name]="ok" ;;
    124 | 137) status[$name]="failed: stopped after $limit s, see $logs/$name.log" ;;
    *) status[$name]="failed: exit code $code, see $logs/$name.log" ;;
  esac
  status[$name]+=" ($((SECONDS - started)) s)"
}

able=() total=0
for name in build "${chosen[@]}"; do
  [[ -z ${status[$name]:-} ]] || continue
  reasons=$(lacks "$name")
  if [[ -n $reasons ]]; then
    status[$name]="unsupported: $reasons"
  elif [[ $name == build ]]; then
    part build 130
  elif [[ " ${able[*]} " != *" $name "* ]]; then
    able+=("$name") total=$((total + share[$name]))
  fi
done
for name in "${able[@]}"; do
  part "$name" $(((DEADLINE - SECONDS) * share[$name] / total))
  total=$((total - share[$name]))
done

echo "=== summary"
timeout 15 "$PYTHON" -m bench summary --device cuda --out "$results" 2>&1
failed=0
for name in "${PARTS[@]}"; do
  [[ -n ${status[$name]:-} ]] || continue
  printf '%-9s %s\n' "$name" "${status[$name]}"
  [[ ${status[$name]} != failed* ]] || failed=1
done
# Named as from DIR, or from here.
folder=${out:-.} places=(out/gpu bench/results)
[[ -z $out ]] || places=(.)
tar -czf "$logs/gpu.tgz" -C "$folder" --null -T <(
  cd "$folder" && find "${places[@]}" -type f -newer "$begun" ! -name gpu.tgz -print0
)
exit "$failed"
