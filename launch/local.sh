#!/usr/bin/env bash
# Runs a recipe on this machine with DeepSpeed's launcher: one rank per accelerator, or RANKS CPU ranks (default 2).
#
#   launch/local.sh recipes/sft.py --config configs/sft/quickstart.yaml [section.key=value ...]

set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
accelerators=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$accelerators" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
fi
ranks=${RANKS:-$((accelerators > 0 ? accelerators : 2))}
port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
exec deepspeed --num_accelerators "$ranks" --master_port "$port" --no_local_rank --log_level warning "$@"
