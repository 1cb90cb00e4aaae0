#!/bin/sh
# 35_small.sh BIN BUILD: a small machine. The demo model answers within 16 MiB of addresses beyond
# its file, and with little stack.
bin=$1
. tests/script.sh
demo=tools/demo/demo.mdr
question="What are the symptoms of diabetes?"

ask() { # KIB-OF-ADDRESSES KIB-OF-STACK OPTION...
    addresses=$1 stack=$2
    shift 2
    (ulimit -v "$addresses" && ulimit -s "$stack" && "$bin/medrun" "$@") 2>&1
}

file=$((($(wc -c < $demo) + 4095) / 4096 * 4))
if ! ask 500000 1024 --version > /dev/null; then
    skip "no address space can be set here, or this build (a sanitizer's?) needs more than 500 MB"
else
    wanted=$("$bin/medrun" run -q $demo -p "$question")
    for options in "-t 1" "-t 2" "-t 2 --lookup 8" "-t 2 --kv int8" "-t 2 --strict -b 64"; do
        # shellcheck disable=SC2086
        found=$(ask $((file + 16384)) 128 run -q $demo -p "$question" $options)
        [ -n "$found" ] && [ "$found" = "$wanted" ] && ok || bad "$options: \"$found\""
    done
    found=$(ask $((file + 1024)) 1024 run -q $demo -p "$question" -t 1)
    [ "$found" != "$wanted" ] && ok || bad "the limit limits nothing"
fi
finish
