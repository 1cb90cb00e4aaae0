#!/bin/sh
# run.sh BIN BUILD UNIT...: runs the test programs BUILD/test_UNIT and the tests of the commands
# (SCRIPTS: only those, or none), as many at once as JOBS says, and adds up. Every program ends with
# a line "N passed, N failed, N skipped". Behind each line stand the seconds that processors worked
# for it.

# one BIN BUILD ITEM: runs a unit or a script; its line and what it said goes to stdout in one piece,
# its three numbers to BUILD/test.counts.
one() {
    bin=$1 build=$2
    name=$(basename "$3" .sh)
    log="$build/test-$name.log"
    case $3 in *.sh) sh "$3" "$bin" "$build" ;; *) "$build/test_$3" ;; esac > "$log" 2>&1
    status=$?
    line=$(grep -E '^[0-9]+ passed, [0-9]+ failed, [0-9]+ skipped$' "$log" | tail -n 1)
    # shellcheck disable=SC2086
    set -- $line
    if [ $# -ne 6 ]; then
        echo "0 1 0" >> "$build/test.counts"
        printf '%s\n' "$name: ended without its closing line (status $status)
$(tail -n 20 "$log")"
        return
    fi
    failed=$3
    [ "$status" -ne 0 ] && [ "$failed" -eq 0 ] && failed=1
    echo "$1 $failed $5" >> "$build/test.counts"
    said=$(if [ "$failed" -ne 0 ]; then grep -E -A 1 'failed: |FAILED' "$log" | head -n 40
               grep -v ' passed, ' "$log" | tail -n 40; fi
           grep -i '^skip' "$log")
    times > "$log.times"        # not in a subshell, which would have no children
    used=$(awk 'NR == 2 { for (i = 1; i < 3; i++) { split($i, t, "m"); n += 60 * t[1] + t[2] }
                          print int(n) }' "$log.times")
    rm -f "$log.times"
    printf '%s%-16s %s passed, %s failed, %s skipped (%s s)\n' "$said${said:+
}" "$name" "$1" "$failed" "$5" "$used"
}
if [ "$1" = --one ]; then shift; one "$@"; exit 0; fi

bin=$1 build=$2
shift 2
export MEDRUN_TEST_BIN="$bin" MEDRUN_TEST_BUILD="$build"
# The longest stand first, so that at the end no processor is without work.
# shellcheck disable=SC2086
case $SCRIPTS in
    none) ;;
    '') set -- tests/42_*.sh "$@" tests/4[!2]_*.sh tests/[!4]?_*.sh ;;
    *) set -- $SCRIPTS "$@" ;;
esac
: > "$build/test.counts"
printf '%s\n' "$@" | xargs -P "${JOBS:-1}" -n 1 sh "$0" --one "$bin" "$build"
awk -v wanted=$# '
    { passed += $1; failed += $2; skipped += $3 }
    END { if (NR != wanted) print NR " of " wanted " have ended"; failed += NR != wanted
          printf "%d passed, %d failed, %d skipped\n", passed, failed, skipped
          exit failed > 0 }' "$build/test.counts"
