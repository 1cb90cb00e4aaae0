#!/bin/sh
# 42_serve.sh BIN BUILD: medrun-serve as its clients see it. Python's standard library asks (tests/
# serve.py); where there is no Python, only the command line is tried.
. tests/script.sh
serve=$1/medrun-serve
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT

[ -x "$serve" ] || { skip "no medrun-serve here"; finish; }
"$serve" --help > "$T/help" || bad "--help"
check 'help within 78 columns' [ -z "$(awk 'length($0) > 78' "$T/help")" ]
"$serve" 2> "$T/err"; check 'no model' [ $? = 2 ]
"$serve" tools/demo/demo.mdr --prot 5 2> "$T/err"; check 'an unknown option' [ $? = 2 ]
check 'names the nearest' grep -q -e --port "$T/err"
"$serve" tools/demo/demo.mdr --parallel 65 2> "$T/err"; check 'out of range' [ $? = 2 ]
"$serve" "$T/none.mdr" --port 8099 2> "$T/err"; check 'no such file' [ $? = 3 ]
"$serve" Makefile --port 8099 2> "$T/err"; check 'not a checkpoint' [ $? = 3 ]

says='warning .*alpaca begins a turn with plain words' i=0
"$serve" tools/demo/demo.mdr --template alpaca --no-sandbox --host "$T/s.sock" 2> "$T/err" & pid=$!
until grep -q "$says" "$T/err" || [ $((i += 1)) = 200 ]; do sleep 0.1; done
kill $pid; wait $pid
check 'says that texts can pass for turns' grep -q "$says" "$T/err"

# The sanitizers' own threads and maps need what the sandbox forbids.
if grep -qE '__(asan|tsan)_init' "$serve"; then
    export MEDRUN_SERVE_ARGS=--no-sandbox
fi
if command -v python3 > "$T/which"; then
    python3 tests/serve.py "$serve" > "$T/out" 2> "$T/err"
    # shellcheck disable=SC2046
    set -- $(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$T/out" | tail -n 1)
    if [ $# = 6 ]; then
        passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5))
        grep -E 'FAILED|skipped:|requests,' "$T/out"
    else
        bad "serve.py: $(tail -n 5 "$T/err")"
    fi
else
    skip "no python3: medrun-serve's answers"
fi
if [ -n "$LLAMA_SERVER_TESTS" ]; then
    "${PYTHON:-python3}" tests/serve_llama_tests.py "$serve" > "$T/out" 2>&1
    # shellcheck disable=SC2046
    set -- $(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$T/out" | tail -n 1)
    passed=$((passed + ${1:-0})) failed=$((failed + ${3:-1})) skipped=$((skipped + ${5:-0}))
    grep -E 'FAILED|skipped:|not in the list|of its server' "$T/out"
fi
finish
