#!/bin/sh
# Runs fuzz targets, each for some seconds: run.sh SECONDS [TARGET...]; without targets, all of them.
# Needs a nightly toolchain and `cargo install cargo-fuzz --locked`. What a target finds is left in artifacts/.
set -eu
seconds=${1:?"usage: run.sh SECONDS [TARGET...]"}
shift
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list)
for target in "$@"; do
    # New inputs go to the first folder; the seeds are only read.
    mkdir -p "fuzz/corpus/$target" "fuzz/seeds/$target"
    cargo +nightly fuzz run "$target" "fuzz/corpus/$target" "fuzz/seeds/$target" -- \
        -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=20 -len_control=0
done
