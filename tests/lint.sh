#!/bin/sh
# lint.sh: what can be checked about the source without running it. Last line as in the tests.
. tests/script.sh
bad() { failed=$((failed + 1)); echo "lint: $1"; }

sources="medrun.c tools/*.c tools/examples/* tests/*.c tests/test.h"

long=$(awk 'length($0) > 100 { print FILENAME ":" FNR }' medrun.c tools/*.c \
       tools/examples/* | head -5)
[ -z "$long" ] && ok || bad "lines past column 100: $long"

# shellcheck disable=SC2086
tabs=$(grep -nP '\t| +$' $sources | head -5)
[ -z "$tabs" ] && ok || bad "tabs or trailing blanks: $tabs"

# A function starts in column 1 with its name and ends with a brace in column 1.
for file in medrun.c tools/*.c; do
    worst=$(awk '/^[a-zA-Z].*\) \{$/ || /^[a-zA-Z].*\($/ { name = $0; start = FNR }
                 /^ .*\) \{$/ && !start { start = FNR }
                 /^\}$/ && start { n = FNR - start + 1; if (n > 100) print n, name; start = 0 }' \
            "$file" | head -3)
    [ -z "$worst" ] && ok || bad "$file: functions over 100 lines: $worst"
done

# Sections are a ladder: no static function is declared before it is defined.
forward=$(grep -nE '^static [^=]*\);$' medrun.c | head -3)
[ -z "$forward" ] && ok || bad "forward declarations: $forward"

# The program has no network and starts no other program.
calls=$(grep -nE '\b(socket|connect|getaddrinfo|gethostbyname|system|popen|execv[pe]*|fork) *\(' \
        medrun.c | head -3)
[ -z "$calls" ] && ok || bad "network or processes: $calls"

for cc in gcc clang; do
    if ! command -v $cc > /dev/null; then
        skip "no $cc"; continue
    fi
    for what in "medrun.c" "-DMEDRUN_NO_MAIN medrun.c" tools/export.c tools/eval.c tools/lab.c; do
        # shellcheck disable=SC2086
        said=$($cc -O2 -Wall -Wextra -Wshadow -Wconversion -c -o /dev/null $what 2>&1)
        [ -z "$said" ] && ok || bad "$cc $what: $(echo "$said" | head -5)"
    done
done

if command -v clang-tidy > /dev/null; then
    checks='-*,bugprone-*,clang-analyzer-*,-bugprone-easily-swappable-parameters'
    checks="$checks,-bugprone-suspicious-include,-bugprone-implicit-widening-of-multiplication-result"
    checks="$checks,-bugprone-narrowing-conversions,-bugprone-assignment-in-if-condition"
    checks="$checks,-bugprone-reserved-identifier,-bugprone-macro-parentheses"
    checks="$checks,-clang-analyzer-security.insecureAPI.*,-bugprone-branch-clone"
    checks="$checks,-bugprone-sizeof-expression,-bugprone-suspicious-string-compare"
    checks="$checks,-bugprone-not-null-terminated-result"
    # the analyser knows neither that a node exists where an index says so, nor that fail() never
    # returns 0
    checks="$checks,-clang-analyzer-core.NullDereference,-clang-analyzer-core.NonNullParamChecker"
    said=$(clang-tidy --quiet --checks="$checks" medrun.c -- -O2 2> /dev/null |
           grep -E 'warning:|error:' | head -5)
    [ -z "$said" ] && ok || bad "clang-tidy: $said"
else
    skip "no clang-tidy"
fi

finish
