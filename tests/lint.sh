#!/bin/sh
# lint.sh [--quick]: what can be checked about the source without running it. Last line as in the
# tests.
. tests/script.sh
bad() { failed=$((failed + 1)); echo "lint: $1"; }

sources="medrun.c tools/*.c tools/examples/* tests/*.c tests/test.h"

long=$(awk 'length($0) > 100 { print FILENAME ":" FNR }' medrun.c tools/*.c \
       tools/examples/* | head -5)
[ -z "$long" ] && ok || bad "lines past column 100: $long"

# shellcheck disable=SC2086
tabs=$(grep -nP '\t| +$' $sources | head -5)
[ -z "$tabs" ] && ok || bad "tabs or trailing blanks: $tabs"

empty=$(awk 'FNR > 1 && $0 == "" && before == "" { print FILENAME ":" FNR } { before = $0 }' medrun.c tools/*.c tests/*.c | head -5)
[ -z "$empty" ] && ok || bad "two empty lines together: $empty"

# A function starts in column 1 with its name and ends with a brace in column 1.
for file in medrun.c tools/*.c; do
    most=100; [ "$file" = medrun.c ] && most=60
    worst=$(awk -v most=$most '/^[a-zA-Z].*\) \{$/ || /^[a-zA-Z].*\($/ { name = $0; start = FNR }
                 /^ .*\) \{$/ && !start { start = FNR }
                 /^\}$/ && start { n = FNR - start + 1; if (n > most) print n, name; start = 0 }' \
            "$file" | head -3)
    [ -z "$worst" ] && ok || bad "$file: functions over $most lines: $worst"
done

# The size is part of the design: SECTION:BUDGET:LIMIT, in lines with comments and blank lines. What
# stands before section 1 counts to it, and 17 to 16. A section over its budget is named, and fails
# above its limit, which is what it has now: limits only ever shrink, until they are the budgets.
budgets="
1:330:330
2:450:708
3:540:629
4:200:200
5:310:258
6:1940:2183
7:130:171
8:350:473
9:180:316
10:950:886
11:520:658
12:450:510
13:420:452
14:100:118
15:720:1018
16:1410:2292"
budgets=$(echo $budgets)                  # on one line
most_lines=11202                            # the goals: 9000, 450000, 15
most_bytes=571372
least_comments=14.4
table=$(awk -v budgets="$budgets" -v most_lines=$most_lines -v most_bytes=$most_bytes \
    -v least=$least_comments '
    function said(limit, budget) { return limit ? "  OVER ITS LIMIT" : budget ? "  over" : "" }
    FNR == 1 { section = 1; name[1] = "head, API" }
    /^ \* [0-9]+ [A-Za-z]+/ && before ~ /^\/\* =====/ {
        banner = $2 + 0
        if (banner == 17) name[16] = name[16] ", main"
        else if (banner > 1) section = banner
        if (banner > 1 && banner < 17) { name[section] = $3 " " $4; sub(/[:,].*/, "", name[section]) }
        if (banner > 1 && banner < 17) { lines[section]++; lines[last]--        # the line of =====
            if (section != last) { comments[section]++; comments[last]-- } }
    }
    { lines[section]++; bytes += length($0) + 1; last = section; before = $0 }
    # lines that are nothing but comment
    inside || /^ *\/\*/ { if (inside || !/\*\// || /\*\/ *$/) { comments[section]++; all++ }
                          inside = !/\*\// }
    END {
        n = split(budgets, pair, " ")
        for (i = 1; i <= n; i++) {
            split(pair[i], b, ":")
            printf "%-2d %-16s %5d of %5d lines, comments %2d %%%s\n", b[1], name[b[1]], lines[b[1]],
                b[2], 100 * comments[b[1]] / lines[b[1]],
                said(lines[b[1]] > b[3], lines[b[1]] > b[2])
        }
        printf "%-19s %5d of  9000 lines, comments %.1f of 15 %%%s\n", "medrun.c", FNR, 100 * all / FNR,
            said(FNR > most_lines || 100 * all < least * FNR, FNR > 9000 || 100 * all < 15 * FNR)
        printf "%-19s %5d of   450 KB%s\n", "", bytes / 1000,
            said(bytes > most_bytes, bytes > 450000)
    }' medrun.c)
echo "$table"
over=$(echo "$table" | grep -c OVER)
failed=$((failed + over)) passed=$((passed + $(echo "$table" | wc -l) - over))
[ "$over" = 0 ] || echo "lint: $over of the limits above are not kept"

# The code alone, each line with its section in front: no comments, nothing within quotes. C strings
# and characters never go over a line in medrun.c.
code=$(mktemp) || exit 1
trap 'rm -f "$code"' EXIT
awk '/^ \* [0-9]+ [A-Za-z]+/ && before ~ /^\/\* =====/ { section = $2 + 0 }
     { before = $0; line = $0; out = "" }
     { while (line != "") {
           if (inside) {
               i = index(line, "*/")
               if (!i) break
               inside = 0; line = substr(line, i + 2)
           } else if (match(line, /\/\*|\/\/|"(\\.|[^"\\])*"|\047(\\.|[^\047\\])*\047/)) {
               found = substr(line, RSTART, 2)
               out = out substr(line, 1, RSTART - 1)
               if (found == "//") break
               if (found == "/*") { inside = 1; line = substr(line, RSTART + 2) }
               else { out = out "@"; line = substr(line, RSTART + RLENGTH) }
           } else { out = out line; break }
       }
       print section + 0 ":" FNR ": " out }' medrun.c > "$code"
# only SECTIONS PATTERN WHAT: code that matches PATTERN stands in SECTIONS ("9|15") alone
only() {
    found=$(grep -E "^[0-9]+:[0-9]+: $2" "$code" | grep -vE "^($1):" | head -3)
    [ -z "$found" ] && ok || bad "$3: $found"
}
only '16|17' '.*\b(getenv|_wgetenv|environ)\b' "the environment is read below section 16"
only '16|17' '.*\b(v?printf|v?fprintf|puts|fputs|putchar|putc|fputc|perror) *\(' "printing below section 16"
only '2|16|17' '.*\b(stdout|stderr|write *\()' "standard streams below section 16, but in 2"
only '9|15|16|17' '.*\bfwrite *\(' "a file is written below section 9, or in 10 to 14"
only 2 '.*\b(mmap|munmap|MapViewOfFile)\b' "memory is mapped outside section 2"
only '2|9' '.*\bmap_bytes *\([^-]' "files are mapped outside section 9"
only '1|15' '[a-z][a-z_0-9 ]*[ *]+medrun_[a-z_]+\([^;]*(\{|$)' "bodies of the API outside section 15"

# Sections are a ladder: no static function is declared before it is defined, but where functions
# call each other in a circle: those are listed here, each with a blank before and behind.
circles=" "
forward=$(sed -nE 's/^static [^=]*[ *]([a-z_0-9]+)\([^=]*\);$/\1/p' medrun.c | while read -r name; do
    case $circles in *" $name "*) ;; *) echo "$name" ;; esac; done | head -3)
[ -z "$forward" ] && ok || bad "forward declarations: $forward"

# The first page follows one token ("One token's way ..." up to the line "MIT licence"). There each
# word behind a number ("13 forward") must be a function of that section, and each other word with a
# _ in it a function. `names` is SECTION:NAME of what is defined, macros of the kernels' names too.
defined=$(sed -E 's/ K\(([a-z_0-9]+)\)\(/ \1(/' "$code" | sed -nE 's/^([0-9]+):[0-9]+: [a-zA-Z][a-zA-Z_0-9 ]*[ *]([a-z_0-9]+)\(.*[^;]$/\1:\2/p')
wrong=$(sed -n "/^ \* One token's way/,/^ \* MIT licence/p" medrun.c | sed 's/`[^`]*`//g' |
    grep -oE '([0-9]+ )?\b[a-z][a-z_0-9]*\b' | while read -r number name; do
        if [ -z "$name" ]; then
            case $number in *_*) name=$number number='[0-9]*' ;; *) continue ;; esac
        fi
        echo "$defined" | grep -qx "$number:$name" || echo "$number $name"
    done | head -5 | tr '\n' ' ')
[ -z "$wrong" ] && ok || bad "the first page names what is no function there: $wrong"
steps=$(sed -n "/^ \* One token's way/,/^ \* MIT licence/p" medrun.c | grep -oE '\b[0-9]+ [a-z_0-9]+' | wc -l)
[ "$steps" -ge 15 ] && ok || bad "the first page follows one token in $steps steps, wanted 15"

# The program has no network and starts no other program.
calls=$(grep -nE '\b(socket|connect|getaddrinfo|gethostbyname|system|popen|execv[pe]*|fork) *\(' \
        medrun.c | head -3)
[ -z "$calls" ] && ok || bad "network or processes: $calls"

[ "$1" = --quick ] && finish         # without compilers, in a second

for cc in gcc clang; do
    if ! command -v $cc > /dev/null; then
        skip "no $cc"; continue
    fi
    for what in "medrun.c" "-DMEDRUN_NO_MAIN medrun.c" tools/export.c tools/eval.c tools/lab.c \
                tools/serve.c tools/explain.c; do
        # gcc sees some faults only when it optimizes; clang says whether it unrolled the loops.
        how=; [ $cc = clang ] && [ "$what" != medrun.c ] && how=-fsyntax-only
        # shellcheck disable=SC2086
        said=$($cc $how -O2 -Wall -Wextra -Wshadow -Wconversion -c -o /dev/null $what 2>&1)
        [ -z "$said" ] && ok || bad "$cc $what: $(echo "$said" | head -5)"
    done
done

# Programs that only `make fuzz` builds.
command -v gcc > /dev/null && for what in tests/fuzz.c tests/fuzz_serve.c; do
    said=$(gcc -fsyntax-only $what 2>&1 | grep -E 'error|warning')
    [ -z "$said" ] && ok || bad "$what: $(echo "$said" | head -3)"
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
