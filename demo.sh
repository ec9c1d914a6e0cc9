#!/usr/bin/env bash
# Show what Stretto does: installs on first use, then compares plain and accelerated pictures. See ./demo.sh --help
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python3}"
command -v "$python" >/dev/null || { echo "Stretto needs Python 3.10 to 3.14: '$python' was not found." >&2; exit 1; }
exec "$python" "$root/scripts/demo.py" "$@"
