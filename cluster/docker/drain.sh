#!/bin/bash
# preStop of a Ray worker's pod: tells Ray that this node goes, waits for what runs on it, then stops it.
#   clinkd-drain [SECONDS]     to wait at most; leave some of terminationGracePeriodSeconds for `ray stop`
# Ray Train hears of a draining node and makes its checkpoint before the node is gone; nothing new is put on it.
# Draining is a courtesy: where Ray does not take it, the node stops all the same.
set -u
seconds="${1:-90}"

# The raylet's own command line names its node.
for folder in /proc/[0-9]*; do
    while IFS= read -r -d '' word; do
        case "$word" in --node_id=*) node="${word#*=}" raylet="${folder#/proc/}" ;; esac
    done 2>/dev/null <"$folder/cmdline"
    [ -n "${node:-}" ] && break
done

if [ -n "${node:-}" ]; then
    # Its cluster Ray finds by RAY_ADDRESS, which the operator sets, or by what `ray start` has written.
    if ray drain-node --node-id "$node" --reason DRAIN_NODE_REASON_PREEMPTION \
        --reason-message "the pod is to end" --deadline-remaining-seconds "$seconds"; then
        # An idle node ends at once, a busy one by the deadline.
        for ((waited = 0; waited < seconds; waited++)); do
            kill -0 "$raylet" 2>/dev/null || break
            sleep 1
        done
    fi
fi
ray stop --grace-period 15
