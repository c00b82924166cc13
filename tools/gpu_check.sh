#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds the CUDA library, holds every op that has a CUDA kernel to float64 on the CPU,
# and times it against mamba-ssm and causal-conv1d where they are installed. Fails where there is no GPU: nothing is
# counted as checked then. PYTHON names the interpreter; by default that of .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" tools/gpu_check.py --only-look
LAYERZOO_CUDA=1 "$python" setup.py -q build_ext --inplace
exec "$python" tools/gpu_check.py
