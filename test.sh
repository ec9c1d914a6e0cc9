#!/usr/bin/env bash
# Everything that CI runs.   ./test.sh        all of it, with a real ComfyUI and a browser
#                            ./test.sh fast   what takes under two minutes: no server, no browser, nothing slow
#                            ./test.sh gpu    kernels and runs on CUDA against the CPU; skipped, with the reason, without
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python="${PYTHON:-python3}"
command -v "$python" >/dev/null || { echo "Stretto needs Python 3.10 to 3.14: '$python' was not found." >&2; exit 1; }
exec "$python" scripts/run_tests.py "$@"
