#!/usr/bin/env bash
# Runs a recipe on the hosts of a hostfile (lines of `NAME slots=RANKS`) with DeepSpeed's launcher, over ssh and pdsh.
#
#   HOSTFILE=hostfile launch/hostfile.sh recipes/sft.py --config configs/sft/quickstart.yaml [section.key=value ...]
#
# MASTER_ADDR is the address of the first host where it has several; MASTER_PORT is 29500 unless set.

set -euo pipefail

if [ $# -eq 0 ]; then
    sed -n '1d; /^#/!q; s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
hostfile=${HOSTFILE:-hostfile}
if [ ! -s "$hostfile" ]; then
    echo "error: no hostfile $hostfile (HOSTFILE names it): it needs a line like \`node1 slots=8\` for every host" >&2
    exit 2
fi
if ! command -v pdsh >/dev/null; then
    echo "error: DeepSpeed's launcher needs pdsh on this host (Debian: apt-get install pdsh)" >&2
    exit 2
fi

# The arguments pass through pdsh, which replaces %h, %n and %u, and a shell on each host, which must not see words or
# patterns in them. DeepSpeed itself puts those with spaces between double quotes.
arguments=()
for argument in "$@"; do
    case $argument in
    *' '*) argument=$(printf '%s' "$argument" | sed 's/[\\$`]/\\&/g') ;;
    *) argument=$(printf '%q' "$argument") ;;
    esac
    arguments+=("${argument//%/%%}")
done
exec deepspeed --hostfile "$hostfile" --force_multi ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} \
    --master_port "${MASTER_PORT:-29500}" --no_local_rank --log_level warning "${arguments[@]}"
