#!/bin/sh
# grade.sh FOLDER: FOLDER/NAME/05.c is what NAME wrote for lesson 5. Writes CSV: a line a student, a
# column a lesson: 1 right, 0 not yet, empty: not handed in. SEED sets the inputs. Each program gets
# 30 seconds and 1 GB; a student's program can do what you can, so run this where nothing is lost.
set -u
folder=$1
here=$(cd "$(dirname "$0")" && pwd)
for exercises in "$here" "$here/../exercises"; do [ -e "$exercises/engine.c" ] && break; done
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
lessons="01 02 03 04 05 06 07 08 09 10"
printf 'student'
for n in $lessons; do printf ',%s' "$n"; done
echo
for student in "$folder"/*/; do
    name=$(basename "$student")
    printf '"%s"' "$(printf %s "$name" | sed 's/"/""/g')"
    for n in $lessons; do
        result=
        if [ -e "$student$n.c" ]; then
            cp "$student$n.c" "$work/exercise.c"
            # What is already there is not made again; the limits are for the student's program.
            make -s -C "$exercises" BUILD="$work" "$work/engine.o" "$work/harness.o" "$work/check$n.o" > /dev/null 2>&1
            result=0
            (ulimit -t 30 -v 1000000 -f 40000
             make -s -C "$exercises" BUILD="$work" EXERCISE="$work/exercise.c" FOLDER= "$n") \
                > "$work/said" 2> /dev/null < /dev/null && grep -q '^Right: ' "$work/said" && result=1
        fi
        printf ',%s' "$result"
    done
    echo
done
