#!/usr/bin/env bash
# Everything that needs a GPU, in one command of under 9 minutes, without a network:
#   bash bench/gpu.sh [--only build|tests|sanitize|logps|linear|group|step] [--out DIR]
# A part that fails or cannot run does not stop the others; the summary comes last. PYTHON names the interpreter. Peers are
# whatever imports: put their wheels' folder on PYTHONPATH. DIR gets the logs and the JSON (default: out/gpu, bench/results).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

PYTHON=${PYTHON:-python3}
PARTS=(build tests sanitize logps linear group step)
DEADLINE=530
only="" out=""
while (($#)); do
  case $1 in
    --only) only=${2:?--only wants a part} ;;
    --out) out=${2:?--out wants a folder} ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
  esac
  shift 2
done
if [[ -n $only && ! " ${PARTS[*]} " == *" $only "* ]]; then
  echo "--only: got $only, wanted one of ${PARTS[*]}" >&2
  exit 2
fi
logs=${out:-out/gpu} results=${out:-bench/results}
mkdir -p "$logs"
declare -A status

# --- why a part cannot run: nothing said means that it can

no_gpu() {
  "$PYTHON" -c 'import torch; torch.cuda.is_available() or print("PyTorch sees no GPU")' 2>/dev/null ||
    echo "$PYTHON has no PyTorch"
}
no_extension() {
  "$PYTHON" -c 'import nca_kernels._cuda' 2>/dev/null || echo "nca_kernels._cuda is not built"
}
no_tool() { command -v "$1" >/dev/null || echo "$1 is not on PATH"; }

why_not_build() { no_tool nvcc; }
why_not_tests() { no_gpu; no_extension; }
why_not_sanitize() { no_tool compute-sanitizer; no_gpu; no_extension; }
why_not_logps() { no_gpu; }
why_not_linear() { no_gpu; }
why_not_group() { no_gpu; }
why_not_step() { [[ -f bench/step.py ]] || echo "bench/step.py is not there"; no_gpu; }

# --- the parts

run_build() {
  local built
  built=$(find nca_kernels -name '_cuda*.so' | head -1)
  if [[ -n $built && -z $(find csrc setup.py -newer "$built") ]]; then
    echo "built already: $built"
    return
  fi
  NCA_KERNELS_BUILD=cuda "$PYTHON" setup.py build_ext --inplace
}

run_tests() {
  local workers=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && workers=(-n 8)
  # What runs on a GPU; the rest of the suite does not know whether there is one.
  "$PYTHON" -m pytest -q "${workers[@]}" --require-backend=triton,cuda \
    tests/test_{gpu,token_logps,group_loss,linear,ops,memory,properties,bad_input,dispatch}.py
}

run_sanitize() {
  local tools=(memcheck racecheck initcheck) tool failures=0
  # No cache: each tensor is then an allocation of its own, with bounds and a history that the tools know.
  for tool in "${tools[@]}"; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" "$PYTHON" -m pytest -q -p no:cacheprovider \
      tests/test_token_logps.py tests/test_group_loss.py -k 'cuda and not (32000 or 50257 or 128256 or 151936)' \
      >"$logs/$tool.log" 2>&1 &
  done
  wait
  for tool in "${tools[@]}"; do
    # PyTorch's own kernels are under the tool, too: only what names ours counts.
    local errors
    errors=$(grep -cE '^=+ .*(token_logps|group_loss)_[a-z]+_kernel' "$logs/$tool.log")
    echo "$tool: $errors reports on this package's kernels; $(grep -E '[0-9]+ (passed|failed|error)' "$logs/$tool.log" | tail -1)"
    if ((errors)) || ! grep -qE '[0-9]+ passed' "$logs/$tool.log" || grep -qE '[0-9]+ (failed|error)' "$logs/$tool.log"; then
      failures=$((failures + 1))
      grep -A12 -m3 -E '^=+ .*(token_logps|group_loss)_[a-z]+_kernel' "$logs/$tool.log" || tail -20 "$logs/$tool.log"
    fi
  done
  return "$failures"
}

run_logps() { "$PYTHON" -m bench logps --device cuda --out "$results"; }
run_linear() { "$PYTHON" -m bench linear --device cuda --out "$results"; }
run_group() { "$PYTHON" -m bench group --device cuda --out "$results"; }
run_step() { "$PYTHON" -m bench step --device cuda --out "$results"; }

part() { # name, seconds
  local name=$1 limit=$2 reasons code started=$SECONDS
  [[ -z $only || $only == "$name" ]] || return
  echo "=== $name"
  reasons=$("why_not_$name" | paste -sd ';' | sed 's/;/; /g')
  if [[ -n $reasons ]]; then
    status[$name]="unsupported: $reasons"
    echo "${status[$name]}"
    return
  fi
  local left=$((DEADLINE - SECONDS))
  if ((left < 10)); then
    status[$name]="failed: no time left"
    return
  fi
  ((limit < left)) || limit=$left
  # A shell of its own, so that the limit stops the whole part.
  export PYTHON logs results
  timeout --kill-after=5 "$limit" bash -c "$(declare -f "run_$name"); run_$name" 2>&1 | tee "$logs/$name.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) status[$name]="ok" ;;
    124 | 137) status[$name]="failed: stopped after $limit s" ;;
    *) status[$name]="failed: exit code $code, see $logs/$name.log" ;;
  esac
  status[$name]+=" ($((SECONDS - started)) s)"
}

part build 130
part tests 120
part sanitize 70
part logps 100
part linear 60
part group 30
part step 60

echo "=== summary"
"$PYTHON" -m bench summary --device cuda --out "$results" 2>&1
failed=0
for name in "${PARTS[@]}"; do
  [[ -n ${status[$name]:-} ]] || continue
  printf '%-9s %s\n' "$name" "${status[$name]}"
  [[ ${status[$name]} != failed* ]] || failed=1
done
exit "$failed"
