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
finish
