#!/usr/bin/env bash
# Runs a recipe under torchrun: on this machine, or on NODES machines that find each other at RENDEZVOUS. Start it on each.
#
#   NODES=2 RENDEZVOUS=node1:29400 launch/torchrun.sh recipes/sft.py --config configs/sft/quickstart.yaml [...]
#
# NODES=MIN:MAX lets machines leave and join, and RESTARTS=n starts the ranks again up to n times; both continue from a
# checkpoint only with train.resume=auto. RANKS per machine: the accelerators, or 2 CPU ranks.

set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
if [ "${NODES:-1}" != 1 ] && [ -z "${RENDEZVOUS:-}" ]; then
    echo "error: NODES=$NODES needs RENDEZVOUS=HOST:PORT, the same on all of them; HOST is one of them" >&2
    exit 2
fi
accelerators=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$accelerators" -eq 0 ]; then
    export DS_ACCELERATOR=cpu
fi
exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${RANKS:-$((accelerators > 0 ? accelerators : 2))}" \
    --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" --rdzv-id "${RENDEZVOUS_ID:-alphatoken}" \
    --max-restarts "${RESTARTS:-0}" "$@"
