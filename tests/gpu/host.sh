#!/usr/bin/env bash
# Makes a Python environment on a GPU host that reaches no registry: the host's own torch, and before it the packages
# of the given archives (.txz of a site-packages folder), the last one first.
# Usage: tests/gpu/host.sh DIR ARCHIVE... ; then DIR/bin/python
set -euo pipefail
dir=$1
shift
python3 -m venv --without-pip "$dir"
site=$("$dir/bin/python" -c 'import site; print(site.getsitepackages()[0])')
for archive in "$@"; do tar xJf "$archive" -C "$site"; done
python3 -c 'import site; print("\n".join(site.getsitepackages()))' > "$site/host.pth"
