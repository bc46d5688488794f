#!/usr/bin/env bash
# One command on a machine with a GPU and no network: builds, tests, looks for races and stray
# accesses, searches tiles, measures against the peers, and writes one results file to commit.
#
#   bench/device.sh [--dry-run] [--part NAME] [--wheels DIR] [--minutes N]
#
# --help says more. PYTHON names another interpreter than python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" bench/device "$@"
