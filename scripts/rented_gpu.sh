#!/usr/bin/env bash
# Train on a GPU that is rented for minutes and has no network: one folder is brought along, one is taken home.
#
#   rented_gpu.sh check LOAD OUT [...]                run first: check_gpu.py (165 s)
#   rented_gpu.sh benchmark LOAD OUT [...]            or, in a later rental: benchmark.py
#   rented_gpu.sh train LOAD OUT BUDGET TABLE [...]   run second: reproduce.py with its arguments, for a time (490s, 9m)
#   rented_gpu.sh home OUT [...]                      at home: reproduce.py --import, and checkpoints into results/runs
#
# LOAD may hold: wheels/ (packages that the machine lacks), data/ (a folder of data, or restore.py that writes one),
# inductor.* (an earlier rental's compiled kernels). OUT gets at most 8 files of 16 MB, 64 MB together: logs, results,
# checkpoints and compiled kernels. `train` wants an OUT without an earlier command's results. Checkpoints of unfinished
# runs in results/unfinished/ are continued.
#
# MPS=1 rented_gpu.sh train ...: runs are processes instead of threads of one process. They share the GPU through
# NVIDIA's MPS server, which this script starts and ends.
#
# WORK (default /tmp/mbn) is kept between commands while the machine is rented. Set MBN_COMMIT to what
# `git describe --always --dirty --abbrev=40 --exclude '*'` prints at home: records name it, and not a git folder that
# whoever copied the code may have made there.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
work=${WORK:-/tmp/mbn}
checkout=$work/checkout
part=${PART:-15M} # of an archive: so much may a file have that is brought home
most=${MOST:-62M} # so much may all files have together
export PYTHONUNBUFFERED=1 PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-$(nproc)}
# Up to 32 lanes, each with a stream, may reach the device at a time.
export CUDA_DEVICE_MAX_CONNECTIONS=32

usage() { sed -n '2,21s/^# \{0,1\}//p' "$0" >&2; exit 2; }

fail() { echo "error: $1" >&2; exit 2; }

folder() { # its absolute path; it is made if it is not there
  mkdir -p "$1"
  (cd "$1" && pwd)
}

start_mps() {
  if ! command -v nvidia-cuda-mps-control >/dev/null; then
    fail "there is no nvidia-cuda-mps-control here: leave MPS=1 out."
  fi
  export CUDA_MPS_PIPE_DIRECTORY="$work/mps" CUDA_MPS_LOG_DIRECTORY="$work/mps"
  mkdir -p "$work/mps"
  nvidia-cuda-mps-control -d
  trap 'echo quit | nvidia-cuda-mps-control' EXIT
}

unpack() { # LOAD
  mkdir -p "$work/site" "$work/inductor"
  rm -rf "$checkout"
  mkdir "$checkout"
  (cd "$here" && cp -r configs mbn models scripts tests train.py pyproject.toml "$checkout")
  cp -r "$1/." "$work/"
  if compgen -G "$work/wheels/*.whl" >/dev/null; then
    python3 -m pip install -q --disable-pip-version-check --no-index --no-deps --no-compile --upgrade \
      --target "$work/site" "$work"/wheels/*.whl
  fi
  if compgen -G "$work/inductor.??" >/dev/null; then
    cat "$work"/inductor.?? | tar xz -C "$work/inductor" || echo "compiled kernels: not all could be unpacked" >&2
    rm "$work"/inductor.??
  fi
}

data_folder() {
  if [ -f "$work/data/restore.py" ]; then
    (cd "$work/data" && python3 restore.py "$work/restored" cifar*) >&2
    echo "$work/restored"
  else
    echo "$work/data"
  fi
}

bring_unfinished() { # what an earlier command of this rental has taken further stays
  local path run
  for path in "$here"/results/unfinished/*/*/*/; do
    run=$work/results/runs/${path#"$here"/results/unfinished/}
    if [ -d "$path" ] && [ ! -d "$run" ]; then
      mkdir -p "$run"
      cp -r "$path." "$run"
    fi
  done
}

room() { # OUT: how many more parts of archives there is room for
  local files bytes left
  files=$(find "$1" -type f | wc -l) bytes=$(find "$1" -type f -printf '%s\n' | awk '{ n += $1 } END { print n + 0 }')
  left=$(($(numfmt --from=iec "${most^^}") - bytes))
  if [ "$left" -lt 0 ]; then
    echo -1
  else
    left=$((left / $(numfmt --from=iec "${part^^}")))
    echo $((left < 8 - files ? left : 8 - files))
  fi
}

pack() { # OUT: at most 8 files: 1 log, 1 archive of results, 6 of the rest
  local results="$work/results" names=() finished=() unfinished=()
  cd "$results"
  mapfile -t names < <(find records other_records runs -name '*.json' -o -name metrics.jsonl -o -name log.txt)
  [ "${#names[@]}" -eq 0 ] || tar czf "$1/results.tgz" "${names[@]}"
  while IFS= read -r path; do
    local run=${path#runs/}
    if compgen -G "*records/${run%/checkpoint.pt}.json" >/dev/null; then
      finished+=("$path")
    elif ! cmp -s "$path" "$here/results/unfinished/$run"; then # else it is as it was brought along
      unfinished+=("$path")
    fi
  done < <(find runs -name checkpoint.pt)
  # Unfinished runs first: without their checkpoints they are lost. Then as many finished ones as there is room for.
  split_up "$1" unfinished 4 "${unfinished[@]}"
  # A file may change while it is read: compilers can outlive training for a moment.
  (tar cz -C "$work/inductor" . || true) | split -b "$part" - "$1/inductor."
  if [ -f "$1/inductor.ab" ] || [ "$(room "$1")" -lt 0 ]; then
    echo "inductor: more than there is room for, and half an archive of kernels is useless: left behind"
    rm "$1"/inductor.??
  fi
  split_up "$1" finished "$(room "$1")" "${finished[@]}"
}

rows() { if [ -f "$1/metrics.jsonl" ]; then wc -l <"$1/metrics.jsonl"; else echo 0; fi; }

bring_runs() { # FROM TO: a checkpoint that is there already makes way only for one with a longer journal
  local path run
  while IFS= read -r path; do
    run=${path#"$1/"}
    if [ -f "$2/$run/checkpoint.pt" ] &&
      { [ ! -f "$path/checkpoint.pt" ] || [ "$(rows "$path")" -le "$(rows "$2/$run")" ]; }; then
      echo "$run: $2 has as much of it: left as it is there"
      continue
    fi
    mkdir -p "$2/$run"
    cp -r "$path/." "$2/$run/"
  done < <(find "$1" \( -name metrics.jsonl -o -name checkpoint.pt \) -exec dirname {} \; | sort -u)
}

split_up() { # OUT NAME MOST PATH...
  local out=$1 name=$2 most=$3
  shift 3
  [ "$#" -gt 0 ] && [ "$most" -gt 0 ] || return 0
  tar c "$@" | split -b "$part" - "$out/$name."
  # The first files of half a tar can still be read.
  mapfile -t parts < <(find "$out" -name "$name.??" | sort)
  if [ "${#parts[@]}" -gt "$most" ]; then
    echo "$name: ${#parts[@]} parts of $part, of which $most fit"
    rm "${parts[@]:$most}"
  fi
}

[ "$#" -ge 2 ] || usage
command=$1
shift
[ "$command" = home ] || [ "$#" -ge 2 ] || usage
case $command in
check | benchmark)
  load=$1 out=$(folder "$2")
  shift 2
  unpack "$load"
  cd "$checkout"
  (nvidia-smi -L || true; command -v nvidia-cuda-mps-control || echo "no nvidia-cuda-mps-control") 2>&1 | tee "$out/log"
  if [ "$command" = check ]; then
    python3 scripts/check_gpu.py --out "$out/check.json" "$@" 2>&1 | tee -a "$out/log" || true
  else
    mkdir -p "$work/results"
    python3 scripts/benchmark.py "machine.results='$work/results'" "$@" 2>&1 | tee -a "$out/log" || true
    tar czf "$out/benchmarks.tgz" -C "$work/results" benchmarks
  fi
  ;;
train)
  [ "$#" -ge 4 ] || usage
  load=$1 out=$(folder "$2") budget=$3
  shift 3
  [[ $budget =~ ^([0-9]+(\.[0-9]+)?[smh])+$ ]] || fail "BUDGET is a time, such as 490s, 9m or 1h30m, not $budget."
  ! compgen -G "$out/*.??" >/dev/null && [ ! -e "$out/results.tgz" ] ||
    fail "$out holds what an earlier command brought: name an empty folder."
  began=$SECONDS
  unpack "$load"
  data=$(data_folder)
  cd "$checkout"
  mkdir -p "$work/results/runs" "$work/results/records" "$work/results/other_records"
  bring_unfinished
  cp -r "$here/results/records/." "$work/results/records/"
  seconds=$(python3 -c "from mbn.system.durations import in_seconds; print(in_seconds('$budget') - $((SECONDS - began)))")
  settings=("machine.data='$data'" "machine.results='$work/results'" machine.checkpoint_seconds=60)
  # A run that a CPU has begun or carried on stays on one if nothing is said.
  [[ " $* " == *" machine.device="* ]] || settings+=(machine.device=cuda)
  [ -z "${MPS:-}" ] || { start_mps; settings+=(--no-lanes); }
  code=0
  # If it hangs, it is killed, so that what has come so far is taken home.
  timeout --foreground -k 10 "$((${seconds%.*} + 20))" \
    python3 scripts/reproduce.py "${settings[@]}" --budget "${seconds}s" "$@" 2>&1 | tee "$out/log" || code=$?
  # Records that were brought along are not taken home again; those of an earlier command of this rental are.
  (cd "$here/results/records" && find . -name '*.json' -print0) | (cd "$work/results/records" && xargs -0 -r rm -f)
  pack "$out"
  exit "$code"
  ;;
home)
  [ -d "$1" ] || fail "$1 is not a folder: name what the rental brought."
  out=$(folder "$1")
  shift
  cd "$here"
  unpacked=$(mktemp -d)
  trap 'rm -rf "$unpacked"' EXIT
  for archive in "$out"/*.tgz; do [ ! -e "$archive" ] || tar xzf "$archive" -C "$unpacked"; done
  for name in unfinished finished; do
    if compgen -G "$out/$name.??" >/dev/null; then
      # The end is missing if not all fitted: take the files that are complete.
      cat "$out/$name".?? | tar xv --ignore-zeros -C "$unpacked" >"$unpacked/names" || {
        [ ! -s "$unpacked/names" ] || rm -f "$unpacked/$(tail -n 1 "$unpacked/names")" # it is cut off
        echo "$name: not all checkpoints came home"
      }
    fi
  done
  code=0
  if [ -n "$(find "$unpacked" -path '*records/*' -name '*.json')" ]; then
    # Whatever it refuses, the checkpoints come home.
    python3 scripts/reproduce.py --import "$unpacked" "machine.results='${RESULTS:-results}'" "$@" || code=$?
  fi
  mkdir -p "${RESULTS:-results}/runs"
  if [ -d "$unpacked/runs" ]; then bring_runs "$unpacked/runs" "${RESULTS:-results}/runs"; fi
  if [ -d "$unpacked/benchmarks" ]; then cp -r "$unpacked/benchmarks" "${RESULTS:-results}/"; fi
  exit "$code"
  ;;
*) usage ;;
esac
