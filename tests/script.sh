# script.sh: what the test scripts share. They run in the repository root and source it.
passed=0 failed=0 skipped=0
ok() { passed=$((passed + 1)); }
bad() { failed=$((failed + 1)); echo "FAILED: $*"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $*"; }
check() { what=$1; shift; if "$@"; then ok; else bad "$what"; fi; }      # WHAT COMMAND...
finish() { echo "$passed passed, $failed failed, $skipped skipped"; [ "$failed" -eq 0 ]; exit; }
# What builds programs for other systems, which takes longer than all else, is for `make test-all`.
only_in_test_all() { [ -n "$MEDRUN_TEST_ALL" ] || { skip "$1: make test-all does this"; finish; }; }
