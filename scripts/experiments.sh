#!/bin/sh
# Run every experiment of configs/experiments, one after the other; what is done already is skipped.
#   sh scripts/experiments.sh DATA_DIR OUTPUT [options of `mlx-svd experiment run`]
# e.g. --workers 8, --dry-run, --limit 20 --seeds 2 for a quick look.
set -eu
data=$1 output=$2
shift 2
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/scripts/blas.sh"
failed=""
for file in "$here"/configs/experiments/*.yaml; do
  echo "== $(basename "$file" .yaml)" >&2
  # A broken experiment must not keep the others from running; it is named at the end.
  "${PYTHON:-python}" -m mlx_svd experiment run "$file" --data-dir "$data" --output "$output" "$@" ||
    failed="$failed $(basename "$file" .yaml)"
done
if [ -n "$failed" ]; then
  echo "failed:$failed" >&2
  exit 1
fi
