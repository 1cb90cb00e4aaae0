#!/bin/sh
# 22_eval.sh BIN BUILD - medrun-eval as people use it: shards, going on after kill -9, merging, the
# page, what it refuses. The questions of tests/eval and the demo model.
. tests/script.sh
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
eval=$1/medrun-eval model=tools/demo/demo.mdr other=$2/llama-tied-int8.mdr data=tests/eval
case $eval in /*) ;; *) eval=$PWD/$eval;; esac
LC_ALL=C; export LC_ALL
for v in $(env | sed -n 's/^\(MEDRUN_[A-Z_]*\)=.*/\1/p'); do unset "$v"; done

# code N ARGUMENTS: out and err in $T; the exit code must be N
code() {
    want=$1; shift
    "$eval" "$@" </dev/null >"$T/out" 2>"$T/err"; rc=$?
    if [ $rc = "$want" ]; then ok; else bad "$*: exit $rc, wanted $want: $(cat "$T/err")"; fi
}
err_has() { check "stderr has '$1': $(cat "$T/err")" grep -q -- "$1" "$T/err"; }
out_has() { check "stdout has '$1': $(cat "$T/out")" grep -q -- "$1" "$T/out"; }
one_line() { check "one line: $(cat "$T/err")" [ "$(wc -l <"$T/err")" = 1 ]; }
same() { # FILE FILE: the same lines
    sort "$1" >"$T/a"; sort "$2" >"$T/b"; check "$1 and $2 have the same lines" cmp -s "$T/a" "$T/b"
}

# ---- the line ----
code 0 --version; out_has '^medrun-eval [0-9]'; code 0 -V; out_has '^medrun-eval [0-9]'
code 0 --help; out_has '--fewshot K FILE'; out_has 'Exit codes'
code 2; err_has 'wanted MODEL.mdr TASK DATA'; one_line
code 2 "$model" medqq "$data/medqa.jsonl"; err_has 'task: found medqq'
code 2 "$model" medqa "$data/medqa.jsonl" --mdoe letter; err_has 'nearest is --mode'
for wrong in '--mode x' '--shard 0/3' '--shard 4/3' '--shard 1' '--shard 1/2x' '--limit 0' '--limit 1.5' \
    '--batch x' '--kv f8' '--bos maybe' '--overflow drop' '--summary xml' '--require 2' '--parallel 0' \
    '--resume' '--fewshot 5' '--fewshot x y' '--template llama4' '--fewshot-multiturn --no-template' \
    '--threads 0' '--ctx -1' '--threads 0x2' '--ctx 0x100' '--predict nan' '--require 0x1' '--shard +1/2' "--fewshot 2 $data/medqa.jsonl --mode generate"; do
    # shellcheck disable=SC2086
    code 2 "$model" medqa "$data/medqa.jsonl" $wrong; one_line
done
code 2 "$model" medqa "$data/medqa.jsonl" -n ' 3'; one_line
code 2 "$model" medqa "$data/medqa.jsonl" --shard ' 1/2'; one_line
code 3 "$T/none.mdr" medqa "$data/medqa.jsonl"; one_line
code 3 "$model" medqa "$T/none.jsonl"; one_line
code 3 "$model" medqa "$data/pubmedqa.json"; err_has 'fields missing'; one_line
code 3 "$model" mmlu "$data/anatomy_test.csv" --fewshot 4 "$data/anatomy_dev.csv"; err_has 'only 3 of 4'
code 3 "$model" mmlu "$data/anatomy_test.csv" --fewshot 1 "$data/college_biology_test.csv"; err_has 'about anatomy'
code 7 "$model" medqa "$data/medqa.jsonl" --require 0.99 -q; err_has 'accuracy'
code 0 "$model" medqa "$data/medqa.jsonl" --require 0.01 --limit 4; out_has '| medqa | all | 4 |'; err_has 'were saved'
MEDRUN_LIMIT=3 MEDRUN_FEWSHOT=; export MEDRUN_LIMIT; unset MEDRUN_FEWSHOT
code 0 "$model" medqa "$data/medqa.jsonl" -q; out_has '| medqa | all | 3 |'; unset MEDRUN_LIMIT
MEDRUN_LIMIT= MEDRUN_REQUIRE=0x1 MEDRUN_QUIET=on; export MEDRUN_LIMIT MEDRUN_REQUIRE MEDRUN_QUIET
code 2 "$other" medqa "$data/medqa.jsonl"; err_has 'require'; one_line; unset MEDRUN_REQUIRE
code 0 "$other" medqa "$data/medqa.jsonl"; out_has '| medqa | all | 13 |'; unset MEDRUN_LIMIT
MEDRUN_VERSION=1.0; export MEDRUN_VERSION; code 0 "$other" medqa "$data/medqa.jsonl"; unset MEDRUN_VERSION
MEDRUN_QUIET=loud; code 2 "$other" medqa "$data/medqa.jsonl"; err_has 'MEDRUN_QUIET: found "loud", wanted 0|1'; unset MEDRUN_QUIET

# ---- texts in other encodings, files without end ----
printf 'question,A,B,answer\nFi\350vre?,oui,non,A\n' >"$T/latin.csv"
printf '{"question":"Fi\350vre?","choices":["oui","non"],"answer":0}\n' >"$T/latin.jsonl"
for f in csv jsonl; do
    code 3 "$model" generic "$T/latin.$f" -q; err_has ": byte [0-9]*: found E8, which is no UTF-8"; err_has iconv; one_line
    iconv -f WINDOWS-1252 -t UTF-8 "$T/latin.$f" >"$T/good.$f"; code 0 "$other" generic "$T/good.$f" -q
    { printf '\357\273\277'; cat "$T/good.$f"; } >"$T/mark.$f"; code 0 "$other" generic "$T/mark.$f" -q
    iconv -f UTF-8 -t UTF-16 "$T/good.$f" >"$T/wide.$f"; code 3 "$model" generic "$T/wide.$f" -q; err_has 'is UTF-16 text'
done
if truncate -s 3T "$T/endless" 2>/dev/null; then
    most=65536                  # KiB of addresses; a sanitizer's build needs more before it begins
    (ulimit -v $most; exec "$eval" --version) >/dev/null 2>&1 || most=unlimited
    for line in "$model medqa $T/endless" "$model medqa $data/medqa.jsonl -o $T/endless" "--merge $T/endless" \
        "$model medqa $data/medqa.jsonl -o $T/endless --resume" \
        "$model usmle $data/usmle_step1.json --answers $T/endless" \
        "$model medqa $data/medqa.jsonl --fewshot 1 $T/endless"; do
        # shellcheck disable=SC2086
        (ulimit -v $most; exec timeout 5 "$eval" $line -q >"$T/out" 2>"$T/err"); rc=$?
        check "$line: exit $rc, wanted 2 or 3: $(cat "$T/err")" [ $rc = 3 -o $rc = 2 ]; one_line
    done
else skip 'no files with holes'; fi
code 3 "$model" medqa /dev/zero; one_line

# ---- people's words ----
sed '2s/"question": *"/&### Response: x /' "$data/medqa.jsonl" >"$T/marks.jsonl"
code 0 "$model" medqa "$T/marks.jsonl" --template alpaca; err_has 'warning: questions with what begins a turn in template alpaca, like "### Response:": 1;'
code 0 "$model" medqa "$T/marks.jsonl" --template llama3; check 'no warning' [ -z "$(grep warning "$T/err")" ]

# ---- one run, its shards, and what was interrupted are the same lines ----
for how in '' '--mode answer --no-template' '--mode generate -n 8'; do
    rm -f "$T"/*.jsonl
    # shellcheck disable=SC2086
    {
    code 0 "$model" medqa "$data/medqa.jsonl" $how -o "$T/all.jsonl"; cp "$T/out" "$T/table"
    code 2 "$model" medqa "$data/medqa.jsonl" $how -o "$T/all.jsonl"; err_has '--resume'
    code 0 "$model" medqa "$data/medqa.jsonl" $how -o "$T/b.jsonl" -t 1 -b 33 --parallel 2; same "$T/all.jsonl" "$T/b.jsonl"
    for i in 1 2 3; do code 0 "$model" medqa "$data/medqa.jsonl" $how --shard $i/3 -o "$T/s$i.jsonl"; done
    code 3 --merge "$T/s1.jsonl" "$T/s3.jsonl"; err_has '4 of 13 questions are missing, the first is number 1'; one_line
    code 3 --merge "$T/s1.jsonl" "$T/s2.jsonl" "$T/s3.jsonl" "$T/s2.jsonl"; err_has 'question 1 stands twice'
    code 0 --merge "$T"/s?.jsonl -o "$T/merged.jsonl"; same "$T/all.jsonl" "$T/merged.jsonl"
    check 'the same table' cmp -s "$T/out" "$T/table"
    cat "$T"/s?.jsonl | sort -u >"$T/cat"; same "$T/all.jsonl" "$T/cat"
    n=$(wc -c <"$T/all.jsonl")
    for cut in 0 40 $((n / 3)) $((n / 2)) $((n - 1)) "$n"; do
        head -c "$cut" "$T/all.jsonl" >"$T/c.jsonl"
        code 0 "$model" medqa "$data/medqa.jsonl" $how -o "$T/c.jsonl" --resume; same "$T/all.jsonl" "$T/c.jsonl"
        check 'the same table' cmp -s "$T/out" "$T/table"
    done
    }
done

# ---- kill -9 at any time ----
seq 20 | while read -r i; do sed "s/\"question\": \"/&($i) /" "$data/medqa.jsonl"; done >"$T/many.jsonl"
code 0 "$model" medqa "$T/many.jsonl" -o "$T/plain.jsonl" -q
"$eval" "$model" medqa "$T/many.jsonl" -o "$T/killed.jsonl" -q >"$T/out" 2>&1 & pid=$!
while [ "$(cat "$T/killed.jsonl" 2>/dev/null | wc -l)" -lt 30 ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
code 1 "$model" medqa "$T/many.jsonl" -o "$T/killed.jsonl" --resume; err_has 'another process'
kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
before=$(wc -l <"$T/killed.jsonl")
check "killed in the middle ($before lines)" [ "$before" -lt 261 ]
code 0 "$model" medqa "$T/many.jsonl" -o "$T/killed.jsonl" --resume -q; same "$T/plain.jsonl" "$T/killed.jsonl"
for ends in TERM HUP; do
    rm -f "$T/int.jsonl"
    "$eval" "$model" medqa "$T/many.jsonl" -o "$T/int.jsonl" -q >"$T/out" 2>"$T/err" & pid=$!
    while [ "$(cat "$T/int.jsonl" 2>/dev/null | wc -l)" -lt 20 ] && kill -0 $pid 2>/dev/null; do sleep 0.01; done
    kill -$ends $pid 2>/dev/null; wait $pid; check "$ends: exit 130" [ $? = 130 ]; err_has '--resume goes on'; one_line
done
if command -v parallel >/dev/null && parallel --version 2>/dev/null | grep -q '^GNU'; then
    parallel --will-cite -j2 "$eval" "$model" medqa "$T/many.jsonl" -q -t 1 --shard '{}/4' -o "$T/p{}.jsonl" ::: 1 2 3 4 \
        >/dev/null 2>"$T/err"
    code 0 --merge "$T"/p?.jsonl -o "$T/par.jsonl"; same "$T/plain.jsonl" "$T/par.jsonl"
else skip 'no GNU parallel'; fi

# ---- what a run leaves: files for their owner, and none without a result ----
mode() { ls -l "$1" | head -c 10; }
(umask 022; exec "$eval" "$other" generic "$data/generic.jsonl" --limit 2 -q -o "$T/mine.jsonl" --html "$T/mine.html") >"$T/out" 2>&1
(umask 022; exec "$eval" --merge "$T/mine.jsonl" -o "$T/both.jsonl") >"$T/out" 2>&1
echo 'a letter' >"$T/open.jsonl"; chmod 666 "$T/open.jsonl"             # --force: not with its old mode
code 0 "$other" generic "$data/generic.jsonl" --limit 2 -q --force -o "$T/open.jsonl"
for f in mine.jsonl mine.html both.jsonl open.jsonl; do
    check "$f is for its owner: $(mode "$T/$f")" [ "$(mode "$T/$f")" = '-rw-------' ]
done
code 5 "$other" generic "$data/generic.jsonl" -c 9 -q -o "$T/empty.jsonl"
check 'no result, no file' [ ! -e "$T/empty.jsonl" ]
code 5 "$other" generic "$data/generic.jsonl" -c 9 -q -o "$T/empty.jsonl" --resume
check 'nor with --resume' [ ! -e "$T/empty.jsonl" ]

# ---- what does not belong together ----
code 0 "$other" medqa "$data/medqa.jsonl" --shard 2/3 -q -o "$T/other.jsonl"
rm "$T"/s?.jsonl
for i in 1 2 3; do code 0 "$model" medqa "$data/medqa.jsonl" -q --shard $i/3 -o "$T/s$i.jsonl"; done
code 3 --merge "$T/s1.jsonl" "$T/other.jsonl" "$T/s3.jsonl"; err_has 'other.jsonl: model: found'; one_line
code 3 "$model" medqa "$data/medqa.jsonl" --mode answer -o "$T/s1.jsonl" --resume; err_has 'mode: found letter, wanted answer'
code 3 "$model" medqa "$data/medqa_hf.jsonl" -o "$T/s1.jsonl" --resume; err_has 'file: found'
code 3 --merge "$data/medqa.jsonl"; err_has 'not a result'; one_line
code 3 --merge "$T/none.jsonl"; one_line
code 2 --merge; one_line
for line in '{}' '{"medrun-eval":1,"run":1,"data":2}' '{"medrun-eval":1,"run":{},"data":{}}' \
    '{"medrun-eval":1,"run":{},"data":{"questions":0,"task":"x"}}'; do
    echo "$line" >"$T/bad.jsonl"; code 3 --merge "$T/bad.jsonl"; one_line
done
for line in '{' '{}' '[]' '{"n":99}' '{"n":0}' '{"n":0,"choices":[1,2],"truth":5,"pred":0}' \
    '{"n":0,"choices":[1,2],"truth":1,"pred":-9}' '{"n":0,"choices":[1,2],"truth":1,"pred":0,"ll":[1]}' \
    '{"n":0,"choices":[1,2],"truth":1,"pred":0,"ll":[1,2]}' '{"n":0,"choices":[1],"truth":0,"pred":0}'; do
    { head -n 1 "$T/s1.jsonl"; echo "$line"; } >"$T/bad.jsonl"; code 3 --merge "$T/bad.jsonl"; one_line; err_has ':2'
done
{ head -n 1 "$T/s1.jsonl"; echo '{'; } >"$T/bad.jsonl"
code 3 "$model" medqa "$data/medqa.jsonl" -o "$T/bad.jsonl" --resume; err_has ':2: JSON'; one_line

# ---- too long ----
code 5 "$model" medqa "$data/medqa.jsonl" -c 80; err_has '> context 80'; one_line
code 0 "$model" medqa "$data/medqa.jsonl" -c 80 --overflow skip -q -o "$T/skip.jsonl"; out_has 'skipped, too long'
check 'skipped ones have lines' [ "$(grep -c '"skipped":' "$T/skip.jsonl")" -gt 0 ]
check 'each question has one' [ "$(wc -l <"$T/skip.jsonl")" = 14 ]
code 0 --merge "$T/skip.jsonl"; out_has 'skipped, too long'

# ---- a file of results may have come from anyone ----
sed '1s/"task":"medqa"/"task":"a\\u001b[31m\\u009b\\u202e<b>"/' "$T/skip.jsonl" >"$T/hostile.jsonl"
check 'the name was changed' [ "$(head -n 1 "$T/hostile.jsonl" | grep -c 'u009b')" = 1 ]
code 0 --merge "$T/hostile.jsonl" --html "$T/hostile.html"
out_has '^| a?\[31m??<b> |'; out_has '^a?\[31m??<b>: skipped'
check 'a task name drives no terminal' [ "$(grep -c "$(printf '\033\|\302\233\|\342\200\256')" "$T/out")" = 0 ]
check 'and is no markup' [ "$(grep -c '[[]31m[^<]*<b>' "$T/hostile.html")" = 0 ]

# ---- tasks, groups, the page ----
for f in anatomy college_biology; do
    code 0 "$model" mmlu "$data/${f}_test.csv" --fewshot 2 "$data/anatomy_dev.csv" --subject anatomy -q -o "$T/shots_$f.jsonl"
    code 0 "$model" mmlu "$data/${f}_test.csv" -q -o "$T/task_$f.jsonl"
done
for t in 'medqa medqa.jsonl' 'medmcqa medmcqa.jsonl' 'pubmedqa pubmedqa.json'; do
    code 0 "$model" ${t% *} "$data/${t#* }" -q -o "$T/task_${t% *}.jsonl"
done
code 0 --merge "$T"/task_*.jsonl --html "$T/page.html"
out_has "^medrun demo (int8) on mmlu, medmcqa, medqa, pubmedqa, .*$(date +%Y-)"
out_has '| acc | chance |'; out_has '^| medqa | all | 13 | 0[.0-9]* | 0.2500 |'; out_has '^| pubmedqa | all | 4 | 0[.0-9]* | 0.3333 |'
out_has 'medqa: these choices are noise: together they hold [0-9.]*e-[0-9]* of the probability (median)'
out_has '^acc: .*acc_norm: each log-likelihood is divided'
out_has "^| mmlu | all | 15 |"; out_has '^| mmlu | anatomy | 10 |'; out_has '^| pubmedqa | all | 4 |'
check 'no group of nine yet' [ "$(grep -c multimedqa "$T/out")" = 0 ]
for f in clinical_knowledge college_medicine medical_genetics professional_medicine; do
    cp "$data/college_biology_test.csv" "$T/${f}_test.csv"
    code 0 "$model" mmlu "$T/${f}_test.csv" -q -o "$T/task_$f.jsonl"
done
code 0 --merge "$T"/task_*.jsonl --summary json
out_has '"task":"multimedqa","subject":"","n":65,'
code 0 --merge "$T"/task_*.jsonl "$T/shots_anatomy.jsonl"           # other settings: other rows
out_has '^| mmlu | anatomy | shots 0 | 10 |'; out_has '^| mmlu | anatomy | shots 2 | 10 |'
check 'what all share is said once' [ "$(grep -c 'model .*shots' "$T/out")" = 0 ]
code 0 --merge "$T/task_medqa.jsonl" "$T/shots_anatomy.jsonl" --summary json
out_has '"runs":.*"run":0,"task":"medqa".*"run":1,"task":"mmlu"'
code 2 --merge "$T/task_anatomy.jsonl" "$T/shots_anatomy.jsonl" -o "$T/two.jsonl"
code 0 "$other" mmlu "$data/anatomy_test.csv" --fewshot 2 "$data/anatomy_test.csv" -q
out_has 'mmlu: scored although they are among the shots.*: questions 1, 2 of anatomy_test.csv'
check 'one plot of calibration a task' [ "$(grep -c '<svg' "$T/page.html")" = 4 ]
check 'no heading stands twice' [ -z "$(grep -o '<h[1-3]>.*</h[1-3]>' "$T/page.html" | sort | uniq -d)" ]
check 'questions are counted from 1' [ "$(grep -c '<summary>0[.]' "$T/page.html")" = 0 ]
for words in "<title>medrun demo (int8) on mmlu, medmcqa, medqa, pubmedqa, $(date +%Y-)" "<h1>medrun demo.*<time>$(date +%Y-)" \
    'one, among the choices: [01][.]' 'answer, among the choices' 'acc_norm: each' '<th>chance' 'choices are noise' \
    '<svg' 'Calibration: medqa' '^<tr class="all"><td>medqa' 'of 13 are right; guessing would get 0.2500' 'interval is 0[.]' 'prefers-color-scheme' '<b>(right)</b>' 'Research and teaching only'; do
    check "the page has $words" grep -q -- "$words" "$T/page.html"
done
code 0 --merge "$T"/task_*.jsonl --html "$T/page.html"             # over an older page
echo mine >"$T/notes.html"; ln -s page.html "$T/link.html"
code 2 --merge "$T"/task_*.jsonl --html "$T/notes.html"; err_has 'notes.html exists and is not a page of medrun-eval'
code 2 --merge "$T"/task_*.jsonl --html "$T/link.html"; err_has 'is a symbolic link'
check 'what is no page stays' [ "$(cat "$T/notes.html")" = mine ]
check 'nothing is left beside the pages' [ -z "$(find "$T" -name '*.html.partial')" ]
check 'the page loads nothing' [ "$(grep -cE 'https?://|src=|url\(' "$T/page.html")" = 0 ]

finish
