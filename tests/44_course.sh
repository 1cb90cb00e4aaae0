#!/bin/sh
# 44_course.sh BIN BUILD: the course in tools/course. For each lesson the exercise as it is handed out
# fails, its solution passes, and planted mistakes, at least three, fail, each with its own hint. The
# engine is compiled once, with the programs' kernels; that of the room's folder is plain C.
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
        $cc $how -Werror -DMEDRUN_KERNELS_APART -c -o "$T/$part.o" $course/$part.c || bad "$part.c does not compile"
done

# said FILE: compiles this exercise of lesson $n; what the check says goes to $T/said
said() {
    # shellcheck disable=SC2086
    $cc $how -O0 $strict -o "$T/lesson" "$1" "$T/check.o" "$T/harness.o" "$T/engine.o" "$build/kernels.o" -lm -lpthread 2> "$T/said" || return 2
    "$T/lesson" $demo > "$T/said" 2> "$T/more"
}

# What an exercise tells to read is there.
grep -hoE 'Read in [^.]*\.c: .*' $course/*/exercise.c | sed 's/Check:.*//' > "$T/read"
check "each exercise names what to read" [ "$(wc -l < "$T/read")" = 10 ]
while read -r _ _ file rest; do
    for name in $(echo "$rest" | grep -oE '[a-z]+_[a-z_0-9]+'); do
        grep -qE "^[A-Za-z].*[ *]$name\(" "${file%:}" && ok || bad "${file%:} has no $name"
    done
done < "$T/read"

for n in 01 02 03 04 05 06 07 08 09 10; do
    # shellcheck disable=SC2086
    $cc $how -Werror -Wconversion -c -o "$T/check.o" $course/$n/check.c && ok || bad "$n/check.c does not compile"
    said $course/$n/exercise.c
    [ $? = 1 ] && grep -q '^Not yet: ' "$T/said" && ok || bad "$n: the exercise as handed out: $(cat "$T/said")"
    strict=-Werror
    for seed in 1 ${MEDRUN_TEST_ALL:+2}; do
        SEED=$seed said $course/teacher/$n/solution.c && grep -q '^Right: ' "$T/said" && ok ||
            bad "$n: the solution with seed $seed: $(cat "$T/said")"
    done
    strict=
    # A mistake is three lines: what it is, a change to the solution, words of the hint.
    grep -v '^#' $course/teacher/$n/mistakes > "$T/mistakes"
    planted=$(($(wc -l < "$T/mistakes") / 2))
    check "$n: at least three mistakes" [ "$planted" -ge 3 ]
    check "$n: two lines each" [ "$(wc -l < "$T/mistakes")" = $((2 * planted)) ]
    : > "$T/hints"
    while read -r change && read -r words; do
        mkdir -p "$T/$n"
        sed "$change" $course/teacher/$n/solution.c > "$T/$n/mistake.c"
        cmp -s "$T/$n/mistake.c" $course/teacher/$n/solution.c && bad "$n: $change changes nothing"
        said "$T/$n/mistake.c"
        [ $? = 1 ] && grep -q -- "^Not yet: .*$words" "$T/said" && ok || bad "$n: $change: $(cat "$T/said")"
        cat "$T/said" >> "$T/hints"
    done < "$T/mistakes"
    check "$n: each mistake has a hint of its own" [ "$(sed 's/[0-9.]*//g' "$T/hints" | sort -u | wc -l)" = "$planted" ]
done

# What never ends and what reads nowhere is said, too.
cat > "$T/wild.c" << 'END'
#include "course.h"
size_t merge_pieces(int32_t *ids, size_t n) {
    int32_t *nowhere = NULL;
    if (getenv("WILD")) n = (size_t)nowhere[ids[0]];
    for (volatile int ever = 1; ever;) continue;
    return n;
}
END
$cc $how -Werror -c -o "$T/check.o" $course/01/check.c
WILD=1 said "$T/wild.c"
[ $? = 1 ] && grep -q '^Not yet: it crashed' "$T/said" && ok || bad "a crash: $(cat "$T/said")"
[ -z "$MEDRUN_TEST_ALL" ] || { said "$T/wild.c"; grep -q '^Not yet: it ran' "$T/said" && ok || bad "a loop without an end: $(cat "$T/said")"; }

# The page of a lesson: its question, its own run; another prompt keeps the question.
explain=$bin/medrun-explain
"$explain" $demo --lesson 9 -n 0 --why last --neurons 0 -q -o "$T/9.html" --force && ok || bad "--lesson 9"
check "the lesson's question" grep -qF "\"question\":$(sed -n 's/^question: //p' $course/09/lesson.md)" "$T/9.html"
# The page and the lesson ask the same.
for n in 01 02 03 04 05 06 07 08 09 10; do
    for what in title question; do
        words=$(sed -n "s/^$what: //p" $course/$n/lesson.md | tr -d '"')
        tr '\n' ' ' < tools/explain_lessons.c | sed 's/" *"//g' | grep -qF "\"$words\"" && ok || bad "$n: the page has another $what: $words"
    done
done
check "its change" grep -q '"old":"diabetes","new":"asthma"' "$T/9.html"
"$explain" $demo --lesson 9 -p "What is gout?" -n 0 --neurons 0 -q -o "$T/9.html" && ok || bad "--lesson 9 -p"
check "another prompt is not changed" [ "$(grep -c '"what_if":' "$T/9.html")" = 0 ]
"$explain" $demo --lesson 11 -q -o "$T/11.html" 2> "$T/said"
[ $? = 2 ] && grep -q 'found 11, wanted 1 to 10' "$T/said" && ok || bad "lesson 11: $(cat "$T/said")"

# Sentences, as in 30_readme.sh: at most 16 words in the mean, for readers who learned English at school.
for page in $course/*/lesson.md $course/teacher/teacher.md $course/index.md; do
    n=$(awk '/^(title|question|goal):/ { sub(/^[a-z]*: /, "") }
        /^$/ || /^(- |1\. |== |[?=~] |\*\*[QA])/ { text = text "\n" }
        /^\{\{.*\}\}$/ { next }
        { sub(/^(- |1\. |== |[?=~] )/, ""); gsub(/ -> /, "\n"); text = text " " $0 }
        END {
            gsub(/\{\{[^}]*\}\}|`[^`]*`/, "x", text)
            n = split(text, sentence, /[.!?:]["*]* |\n/)
            for (i = 1; i <= n; i++) {
                k = split(sentence[i], w, " "); words = 0
                for (j = 1; j <= k; j++) words += w[j] ~ /[A-Za-z0-9]/
                if (words > 1) { all += words; count++ }
            }
            printf "%d", 10 * all / count
        }' "$page")
    [ "$n" -le 160 ] && ok || bad "$page has $n tenths of a word a sentence, at most 160"
done

# The folder for the room: every link leads somewhere, nothing is fetched, solutions are the teacher's.
# shellcheck disable=SC2086
$cc $how -Werror -Wconversion -o "$T/pages" $course/pages.c "$T/engine.o" "$build/kernels.o" -lm -lpthread && ok || bad "pages.c"
class=$T/class
sh $course/class.sh "$bin" "$T/pages" "$T/work" "$class" > "$T/said" 2>&1 && ok || bad "class.sh: $(cat "$T/said")"
check "at most 30 MB" [ "$(du -sk "$class" | cut -f1)" -le 30000 ]
(cd "$class" && sha256sum --quiet -c SHA256SUMS) && ok || bad "SHA256SUMS"
check "solutions lie with the teacher" [ "$(find "$class" -name 'solution*' ! -path '*/teacher/*' | wc -l)" = 0 ]
check "ten solutions, ten exercises" [ "$(find "$class" -name solution.c -o -name exercise.c | wc -l)" = 20 ]
for page in "$class"/*.html "$class"/teacher/*.html; do
    check "$page fetches nothing" [ "$(grep -cE '(src|href)="(https?:)?//|<script src|@import' "$page")" = 0 ]
    for to in $(grep -oE 'href="[^"#]+' "$page" | sed 's/href="//' | grep -v '^data:' | sort -u); do
        [ -e "$(dirname "$page")/$to" ] && ok || bad "$page leads to $to"
    done
done
for n in 01 02 03 04 05 06 07 08 09 10; do
    page=$class/lesson-$n.html
    check "$n: three questions" [ "$(grep -c '<h3>Question' "$page")" = 3 ]
    check "$n: one right answer each" [ "$(grep -c '"good"' "$page")" = 3 ]
    check "$n: replies" [ "$(grep -c '"other"' "$page")" = 6 ]
    check "$n: on the teacher's page" grep -q "<h2 id=\"lesson${n#0}\">" "$class/teacher/teacher.html"
    check "$n: three questions and more for the teacher" [ "$(sed -n '/^== teacher/,$p' $course/$n/lesson.md | grep -c '^\*\*Q')" -ge 3 ]
done
# Figures against other programs, and a figure that is typed by hand.
text() { sed 's/<wbr>//g; s/<[^>]*>/ /g' "$class/lesson-$1.html"; }
says() { text "$1" | grep -qF "$2" && ok || bad "lesson $1 does not say: $2"; }
says 10 "$("$bin/medrun" run -q $demo -p "What is the treatment of bananas?")"
says 01 "Of 12 letters, $("$bin/medrun" tokenize $demo -p " azathioprine" | wc -w) pieces"
check "lesson 01: a common name is one piece" [ "$("$bin/medrun" tokenize $demo -p " methotrexate" | wc -w)" = 1 ]
says 02 "such as $("$bin/medrun" tokenize $demo --special '<|eot_id|>') for"
says 03 "$("$bin/medrun" run -q $demo -p "What are the symptoms of diabetes?")"
mkdir -p "$T/typed/01"
cp $course/style.css "$T/typed"
sed 's/^A model cannot read letters\./& It has 4096 pieces./' $course/01/lesson.md > "$T/typed/01/lesson.md"
"$T/pages" $demo "$T/typed" "$T/work" "$T/typed" 2> "$T/said"
[ $? = 1 ] && grep -q 'typed by hand: 4096' "$T/said" && ok || bad "a figure typed by hand: $(cat "$T/said")"
# An exercise in the room's folder, and a class that is graded.
mkdir -p "$T/handed/Ada" "$T/handed/Bob"
cp $course/teacher/04/solution.c "$T/handed/Ada/04.c"
cp $course/04/exercise.c "$T/handed/Bob/04.c"
MAKEFLAGS='' CC=$cc CFLAGS=$(if [ -n "$MEDRUN_TEST_ALL" ]; then echo -O1; else echo -O0; fi) \
    sh "$class/teacher/grade.sh" "$T/handed" > "$T/said" 2>&1
check "grades: $(cat "$T/said")" [ "$(tail -2 "$T/said" | tr '\n' ' ')" = '"Ada",,,,1,,,,,, "Bob",,,,0,,,,,, ' ]

python=${PYTHON:-python3}
# Another prompt: what its page cannot answer, no step asks. The answer does not end here, and its first
# word stood nowhere before.
for n in 2 5; do
    "$explain" $demo --lesson $n -p "What is gout?" -n 3 --neurons 0 -q --force -o "$T/own$n.html" && ok || bad "--lesson $n -p"
done
in_browser "the course's pages in a browser" tests/44_course_pages.py "$class" "$T/own2.html" "$T/own5.html"
finish
