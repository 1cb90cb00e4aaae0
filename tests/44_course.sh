#!/bin/sh
# 44_course.sh BIN BUILD: the course in tools/course. For each lesson the exercise as it is handed out
# fails, its solution passes, and three planted mistakes fail, each with its own hint. The engine is
# compiled once.
bin=$1 build=$2
cc=${CC:-cc}
. tests/script.sh
course=tools/course demo=tools/demo/demo.mdr
T=$build/course
mkdir -p "$T" || exit 1
how="-O1 -Wall -Wextra -Wshadow -I. -I$course"
case $bin in /*) ;; *) bin=$PWD/$bin ;; esac

for part in engine harness; do
    # shellcheck disable=SC2086
    [ "$T/$part.o" -nt medrun.c ] && [ "$T/$part.o" -nt $course/$part.c ] &&
        [ "$T/$part.o" -nt $course/course.h ] ||
        $cc $how -Werror -DMEDRUN_SCALAR -c -o "$T/$part.o" $course/$part.c || bad "$part.c does not compile"
done

# said FILE: compiles this exercise of lesson $n; what the check says goes to $T/said
said() {
    # shellcheck disable=SC2086
    $cc $how -O0 $strict -o "$T/lesson" "$1" "$T/check.o" "$T/harness.o" "$T/engine.o" -lm -lpthread 2> "$T/said" || return 2
    "$T/lesson" $demo > "$T/said" 2> "$T/more"
}

for n in 01 02 03 04 05 06 07 08 09 10; do
    # shellcheck disable=SC2086
    $cc $how -Werror -Wconversion -c -o "$T/check.o" $course/$n/check.c && ok || bad "$n/check.c does not compile"
    said $course/$n/exercise.c
    [ $? = 1 ] && grep -q '^Not yet: ' "$T/said" && ok || bad "$n: the exercise as handed out: $(cat "$T/said")"
    strict=-Werror
    for seed in 1 2 3; do
        SEED=$seed said $course/teacher/$n/solution.c && grep -q '^Right: ' "$T/said" && ok ||
            bad "$n: the solution with seed $seed: $(cat "$T/said")"
    done
    strict=
    # A mistake is three lines: what it is, a change to the solution, words of the hint.
    grep -v '^#' $course/teacher/$n/mistakes > "$T/mistakes"
    check "$n: three mistakes" [ "$(wc -l < "$T/mistakes")" = 6 ]
    : > "$T/hints"
    while read -r change && read -r words; do
        mkdir -p "$T/$n"
        sed "$change" $course/teacher/$n/solution.c > "$T/$n/mistake.c"
        cmp -s "$T/$n/mistake.c" $course/teacher/$n/solution.c && bad "$n: $change changes nothing"
        said "$T/$n/mistake.c"
        [ $? = 1 ] && grep -q -- "^Not yet: .*$words" "$T/said" && ok || bad "$n: $change: $(cat "$T/said")"
        cat "$T/said" >> "$T/hints"
    done < "$T/mistakes"
    check "$n: each mistake has a hint of its own" [ "$(sed 's/[0-9.]*//g' "$T/hints" | sort -u | wc -l)" = 3 ]
done

# The page of a lesson: its question, its own run; another prompt keeps the question.
explain=$bin/medrun-explain
"$explain" $demo --lesson 9 -n 0 --why last --neurons 0 -q -o "$T/9.html" --force && ok || bad "--lesson 9"
check "the lesson's question" grep -q '"question":"Can it tell me why it said that?"' "$T/9.html"
check "its change" grep -q '"old":"diabetes","new":"asthma"' "$T/9.html"
"$explain" $demo --lesson 9 -p "What is gout?" -n 0 --neurons 0 -q -o "$T/9.html" && ok || bad "--lesson 9 -p"
check "another prompt is not changed" [ "$(grep -c '"what_if":' "$T/9.html")" = 0 ]
"$explain" $demo --lesson 11 -q -o "$T/11.html" 2> "$T/said"
[ $? = 2 ] && grep -q 'found 11, wanted 1 to 10' "$T/said" && ok || bad "lesson 11: $(cat "$T/said")"
finish
