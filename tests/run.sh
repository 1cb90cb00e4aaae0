#!/bin/sh
# run.sh BIN BUILD UNIT...: runs the test programs BUILD/test_UNIT, then the tests of the commands
# (SCRIPTS: only those, or none), and adds up. Every program ends with a line "N passed, N failed,
# N skipped". Behind each line stand the seconds that processors
# worked for it.
bin=$1 build=$2
shift 2
export MEDRUN_TEST_BIN="$bin" MEDRUN_TEST_BUILD="$build"
passed=0 failed=0 skipped=0 log="$build/test.log" used=0

count() { # NAME STATUS: reads the program's last line from the log
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$log" | tail -n 1)
    # shellcheck disable=SC2086
    set -- "$1" "$2" $line
    if [ $# -ne 8 ]; then
        echo "$1: ended without its closing line (status $2)"; tail -n 20 "$log"
        failed=$((failed + 1)); return
    fi
    passed=$((passed + $3)) failed=$((failed + $5)) skipped=$((skipped + $7))
    [ "$2" -ne 0 ] && [ "$5" -eq 0 ] && failed=$((failed + 1))
    if [ "$2" -ne 0 ] || [ "$5" -ne 0 ]; then grep -v ' passed, ' "$log" | tail -n 40; fi
    grep -i '^skip' "$log"
    times > "$log"              # not in a subshell, which would have no children
    until_now=$(awk 'NR == 2 { for (i = 1; i < 3; i++) { split($i, t, "m"); n += 60 * t[1] + t[2] }
                               print int(n) }' "$log")
    printf '%-16s %s passed, %s failed, %s skipped (%s s)\n' "$1" "$3" "$5" "$7" $((until_now - used))
    used=$until_now
}

for unit in "$@"; do
    "$build/test_$unit" > "$log" 2>&1
    count "$unit" $?
done
[ "$SCRIPTS" = none ] || for script in ${SCRIPTS:-tests/[0-9][0-9]_*.sh}; do
    sh "$script" "$bin" "$build" > "$log" 2>&1
    count "$(basename "$script" .sh)" $?
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
