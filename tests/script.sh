# script.sh: what the test scripts share. They run in the repository root and source it.
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED: $*"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $*"; }
check() { what=$1; shift; if "$@"; then ok; else bad "$what"; fi; }      # WHAT COMMAND...
finish() { echo "$passed passed, $failed failed, $skipped skipped"; [ "$failed" -eq 0 ]; exit; }
# What builds programs for other systems, which takes longer than all else, is for `make test-all`.
only_in_test_all() { [ -n "$MEDRUN_TEST_ALL" ] || { skip "$1: make test-all does this"; finish; }; }
# in_browser WHAT SCRIPT ARGUMENT...: what a Python script finds on pages in Chromium joins our counts.
in_browser() {
    if ! "$python" -c "import playwright" 2> /dev/null || ! command -v chromium > /dev/null; then
        skip "$1: no playwright for $python, or no chromium"; return
    fi
    shift
    "$python" "$@" > "$T/said" 2>&1
    rc=$?; grep -v passed "$T/said"
    # shellcheck disable=SC2046
    set -- $(grep -E '^[0-9]+ passed, [0-9]+ failed$' "$T/said" | tail -1)
    passed=$((passed + ${1:-0})) failed=$((failed + ${3:-1}))
    [ $rc = 0 ] || [ "${3:-0}" != 0 ] || failed=$((failed + 1))
}
