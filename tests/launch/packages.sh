#!/usr/bin/env bash
# Installs the Debian packages that tests/launch uses, where it may. Never fails: what is missing, its tests skip.
set -uo pipefail

commands=(slurmctld slurmd munged sshd pdsh ip numactl)
packages=(slurmctld slurmd slurm-client munge openssh-server pdsh iproute2 numactl)

PATH=$PATH:/usr/sbin:/sbin
missing=()
for command in "${commands[@]}"; do
    command -v "$command" >/dev/null || missing+=("$command")
done
if [ ${#missing[@]} -eq 0 ]; then
    exit 0
fi
because="tests/launch: ${missing[*]} missing, and not installed, so that some tests will skip:"
if ! command -v apt-get >/dev/null; then
    echo "$because there is no apt-get"
elif [ "$(id -u)" -ne 0 ]; then
    echo "$because this user is not root"
else
    export DEBIAN_FRONTEND=noninteractive
    log=$(mktemp)
    # No daemon starts by itself: tests start their own.
    policy=/usr/sbin/policy-rc.d
    made_policy=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy" && made_policy=yes
    fi
    if ! { apt-get update && apt-get install --yes --no-install-recommends "${packages[@]}"; } >"$log" 2>&1; then
        echo "$because $(grep '^E:' "$log" || tail -n 1 "$log")"
    fi
    if [ -n "$made_policy" ]; then
        rm -f "$policy"
    fi
    rm -f "$log"
fi
exit 0
