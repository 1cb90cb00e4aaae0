#!/bin/sh
# 16_commands.sh BIN BUILD - what users type: options, errors, exit codes, streams, the terminal.
# Or 16_commands.sh MEDRUN MODEL.mdr TOKENIZER.bin, with any small checkpoint that has a chat template
# and its tokenizer. Python is for the tests on a terminal only.
. tests/script.sh
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
medrun=$1 model=$2 tok=$3 lab=$(dirname "$1")/medrun-lab
if [ -d "$1" ]; then
    medrun=$1/medrun lab=$1/medrun-lab model=$2/llama-tied-int8.mdr tok=$T/tokenizer.bin
    "$1/medrun-export" --tokenizer-only tests/fixtures/llama-tied "$tok" >"$T/err" 2>&1 || cat "$T/err"
fi
case $medrun in /*) ;; *) medrun=$PWD/$medrun lab=$PWD/$lab;; esac
LC_ALL=C TERM=xterm; export LC_ALL TERM
for v in $(env | sed -n 's/^\(MEDRUN_[A-Z_]*\)=.*/\1/p'); do unset "$v"; done
unset NO_COLOR

# code N ARGUMENTS: runs medrun, stdin is /dev/null or $in; out and err in $T; the exit code must be N
code() {
    want=$1; shift
    "$medrun" "$@" <"${in:-/dev/null}" >"$T/out" 2>"$T/err"; rc=$?
    if [ $rc = "$want" ]; then ok; else bad "medrun $*: exit $rc, wanted $want: $(cat "$T/err")"; fi
}
lab() { program=$medrun; medrun=$lab; code "$@"; medrun=$program; }        # the same of medrun-lab
err_has() { check "stderr has '$1': $(cat "$T/err")" grep -q -- "$1" "$T/err"; }
out_has() { check "stdout has '$1': $(head -c 300 "$T/out")" grep -q -- "$1" "$T/out"; }
err_lines() { check "stderr has $1 lines: $(cat "$T/err")" [ "$(wc -l <"$T/err")" = "$1" ]; }
out_is() { check "stdout is $1" cmp -s "$1" "$T/out"; }
no_out() { check "stdout is empty" [ ! -s "$T/out" ]; }
echo >"$T/line_end"
echo hello >"$T/hello"
ones() { i=0; while [ $i -lt "$1" ]; do printf 'ab '; i=$((i + 1)); done; }

# ---- the line ----
code 0 --version; out_has '^medrun [0-9]'
code 0 --help; out_has 'medrun verify'; out_has 'Exit codes'
code 0 help run; out_has '--top-k'; out_has 'card'
code 0 run --help; out_has '--top-k'
code 2 help nonsense
code 2; err_has 'no model'
code 2 rnu "$model"; err_has 'nearest is run'; err_lines 1; no_out
code 2 run "$model" -p x --tmep 1; err_has 'nearest is --temp'; err_lines 1
code 2 run "$model" -p x --temprature 1; err_has 'nearest is --temperature'; err_lines 1
code 2 run "$model" -p x -z; err_has 'unknown option -z'
code 2 "$model" --raw; err_has 'does not go with chat, but with: run'
code 2 show "$model" --lockup 3; err_has 'nearest is --lookup'
code 2 render --data 2024-01-01; err_has 'unknown option --data'
code 2 run "$model" -p; err_has 'wanted TEXT'
code 2 run "$model" extra -p x; err_has 'extra'
code 2 run -m "$model" extra -p x; err_has 'extra'
code 2 run -p x; err_has 'no model'
code 2 run "$model"; err_has 'empty'
code 2 run "$model" -p ''; err_has 'empty'
code 3 run "$model" -p x -f y; err_has 'y: cannot open'
code 2 run "$model" -p x --quiet=1; err_has 'wanted none'
for bad_number in '-n x' '-n 1.5' '-n -2' '-n 1e99' '-c -1' '-t 0' '-t 257' '-b 0' '-s -2' '-s 1e30' \
    '--temp abc' '--temp -1' '--temp 101' '--temp nan' '--temp 0x1' '--temp 1x' '--top-k -1' '--top-k 1.5' \
    '--top-p 1.1' '--top-p -.1' '--min-p 2' '--repeat-penalty 0' '--kv f8' '--kv f' '--kv f16|f32' \
    '--lookup -1' '--lookup 32' '--lookup 10000' '--lookup 1.5' '--lookup many' '--lookup 1x'; do
    code 2 run "$model" -p x $bad_number; err_has "wanted"; err_lines 1; no_out
done
code 2 run "$model" -p x --temp=; err_has '""'
code 2 chat "$model" --overflow maybe; err_has 'error|drop'
code 2 run "$model" -p x --stop ''; err_has 'empty'
code 2 run "$model" -p x --stop 1 --stop 2 --stop 3 --stop 4 --stop 5 --stop 6 --stop 7 --stop 8 --stop 9
code 2 run "$model" -p x --template llama4; err_has 'llama3'
code 2 run "$model" -p x -c 16777216; err_has 'context'
code 3 run "$T/none.mdr" -p x; err_has 'none.mdr'; err_lines 1
code 3 show "$T"; err_has 'folder'
code 3 show "$tok"; err_has 'not a medrun checkpoint'
{ printf MEDRUN01; tail -c +9 "$model"; } >"$T/old.mdr"; code 3 run "$T/old.mdr" -p x; err_lines 1
err_has 'found "01", wanted "02"; make it anew .*: medrun-export SOURCE '; rm "$T/old.mdr"
code 3 run "$model" -f "$T/none.txt"; err_has 'none.txt'
code 3 run "$model" -f "$T"; err_has 'cannot read'
: >"$T/empty"; code 3 show "$T/empty"
head -c 5000 "$model" >"$T/cut.mdr"; code 3 verify "$T/cut.mdr"

# ---- the line that people know from other programs ----
for v in -V version --version; do code 0 $v; out_has '^medrun [0-9]'; done; lab 0 version; lab 0 -V
for word in pull download; do code 2 $word llama3; err_has 'no network'; err_has 'README.md'; err_lines 1; done
for word in list ls ps rm; do code 2 $word; err_has 'README.md'; err_lines 1; no_out; done
code 2 generate "$model"; err_has 'medrun run'; code 2 -cnv "$model"; err_has 'a conversation'
code 2 xyzzy; err_has 'help lists all'; check 'no hint that is far' [ -z "$(grep nearest "$T/err")" ]
for far in --colour --gramophone --no --zzz; do
    code 2 run "$model" -p x $far 1; err_has 'unknown option'; check "no hint for $far" [ -z "$(grep nearest "$T/err")" ]
done
code 2 run "$model" -p x --topk 3; err_has 'nearest is --top-k'; code 2 run "$model" -p x --tempp 3; err_has 'nearest is --temp'
code 3 run tests/fixtures/llama-tied -p x; err_lines 1
err_has ": ${medrun%medrun}medrun-export tests/fixtures/llama-tied llama-tied-int8.mdr --type int8\$"
mkdir "$T/a folder"; : >"$T/a folder/config.json"
code 3 show "$T/a folder/"; err_has "medrun-export \"$T/a folder/\" \"a folder-int8.mdr\" --type int8"
printf 'GGUF\003\000\000\000' >"$T/Some-Q8_0.gguf"
code 3 show "$T/Some-Q8_0.gguf"; err_has "medrun-export $T/Some-Q8_0.gguf Some-Q8_0-int8.mdr --type int8"
code 3 tokenize "$T/Some-Q8_0.gguf" x; err_has 'medrun-export'
for c in '' 'help run' 'help chat' 'help tokenize' 'help render' 'help logits' 'help show' 'run --help' --help; do
    "$medrun" $c >"$T/out" 2>&1; check "no line of $c past column 78" [ -z "$(awk 'length($0) > 78' "$T/out")" ]
done
for c in '' 'help bench' 'help call'; do "$lab" $c >"$T/out" 2>&1; check "nor of lab $c" [ -z "$(awk 'length($0) > 78' "$T/out")" ]; done
code 0 help run; out_has 'default: '; out_has 'maximum tokens'; code 0 help; out_has 'with piped input, answers once'
for c in chat run show verify tokenize detokenize render logits; do
    code 0 help $c; out_has '--quiet'; check "$c -q" [ -n "$(grep -- '-q, --quiet' "$T/out")" ]
done

# ---- run: streams, options anywhere, the environment ----
code 0 run "$model" -p hello -n 12 --temp 0; cp "$T/out" "$T/greedy"; err_lines 2; err_has 'kernels'
err_has 'temperature 0 (flag)'
check "an answer came" [ -s "$T/greedy" ]
code 0 run "$model" -p hello -n 12 --temp 0 -q; out_is "$T/greedy"; err_lines 0
code 0 -n 12 --temp=0 run -q --prompt=hello -- "$model"; out_is "$T/greedy"
code 0 -q -p hello "$model" -n 12 --temp 0; out_is "$T/greedy"
check 'an answer ends its line' [ "$(tail -c 1 "$T/greedy" | wc -l)" = 1 ]
code 0 run "$model" hello -q -n 12 --temp 0; out_is "$T/greedy"; code 0 "$model" hello -q -n 12 --temp 0; out_is "$T/greedy"
code 0 run -m "$model" hello -q -n 12 --temp 0; out_is "$T/greedy"; code 0 -n 12 "$model" -q --temp 0 -- hello; out_is "$T/greedy"
code 2 run "$model" hello again; err_has 'quotes'
for long in '--n-predict 12 --temperature 0' '--max-tokens 12 --temp 0' '--predict 12 --temp 0' '--n_predict 12 --temp 0' \
    '--max-new-tokens 12 --temp 0 --ctx-size 200' '-n 12 --temp 0 --batch-size 3 --threads 1 --seed 3 --top-k 5' '-n 12 --temperature=0 --top_p 0.9'; do
    code 0 run "$model" --prompt hello -q $long; out_is "$T/greedy"
    code 0 run --model "$model" -f "$T/hello" -q $long; out_is "$T/greedy"
done
code 0 run "$model" hello -n 3 --system-prompt 'be brief' -v; err_has 'be brief'; code 0 run "$model" hello -n 3 --chat-template alpaca -v; err_has 'Instruction'
printf 'A note.\nOf two lines.\n' >"$T/note"
code 0 run "$model" -p 'What is this?' -f "$T/note" -n 1 -v -q --temp 0; err_has '^A note.$'
check 'the text, then the file' [ "$(grep -A 3 'What is this?$' "$T/err" | head -4 | tr '\n' '|' | cut -c1-40)" = 'What is this?||A note.|Of two lines.<|eo' ]
cp "$T/err" "$T/shown"; code 0 run "$model" 'What is this?' -f "$T/note" -n 1 -v -q --temp 0; check 'a text that stands alone' cmp -s "$T/err" "$T/shown"
in=$T/note; code 0 run "$model" 'What is this?' -f - -n 1 -v -q --temp 0; check 'a note from stdin' cmp -s "$T/err" "$T/shown"; in=
MEDRUN_PROMPT='What?' code 0 run "$model" -f "$T/note" -n 1 -v; check 'the flag wins' [ -z "$(grep 'What?' "$T/err")" ]
printf '\357\273\277A note.\nOf two lines.\n' >"$T/mark"; code 0 run "$model" 'What is this?' -f "$T/mark" -n 1 -v -q --temp 0; check 'without its mark' cmp -s "$T/err" "$T/shown"
printf 'A note\nfi\350vre' >"$T/latin"; code 3 run "$model" 'What is this?' -f "$T/latin"; err_has 'latin: line 2, byte 9: found'
code 0 run -m "$model" -p hello -n 12 --temp 0 -t 1 -b 3 -c 200; out_is "$T/greedy"
code 0 run "$model" -p hello -n 12 --temp 0 --top-k 3 -s 9; out_is "$T/greedy"
code 0 run "$model" -p hello -n 0; no_out
in=$T/hello
code 0 "$model" -q -n 12 --temp 0; out_is "$T/greedy"
code 0 chat "$model" -q -n 12 --temp 0; out_is "$T/greedy"
code 0 run "$model" -q -n 12 --temp 0 -f -; out_is "$T/greedy"
in=
code 0 run "$model" -q -n 12 --temp 0 -f "$T/hello"; out_is "$T/greedy"
code 0 run "$model" -q -n 12 --temp 0 -p hello --stats; err_lines 1; err_has 'tokens/s'
code 0 run "$model" -n 12 --temp 0 -p hello -v; err_has '^prompt, [0-9]* tokens: [0-9 ]*$'; err_has hello
code 0 run "$model" -n 3 -p hello -sys 'be brief' -v; err_has 'be brief'
MEDRUN_TEMP=0 MEDRUN_PREDICT=12 MEDRUN_QUIET=on MEDRUN_MODEL=$model; export MEDRUN_TEMP MEDRUN_PREDICT
export MEDRUN_QUIET MEDRUN_MODEL
code 0 run -p hello; out_is "$T/greedy"; err_lines 0
MEDRUN_MODEL=$T/none.mdr; code 0 run "$model" -p hello; out_is "$T/greedy"
code 0 tokenize "$tok" -p hello; code 0 run -m "$model" -p hello; MEDRUN_MODEL=$model
MEDRUN_PREDICT=1; code 0 run -p hello -n 12; out_is "$T/greedy"
MEDRUN_PREDICT=x; code 2 run -p hello; err_has MEDRUN_PREDICT
MEDRUN_PREDICT=12 MEDRUN_QUIET=maybe; code 2 run -p hello; err_has MEDRUN_QUIET
MEDRUN_QUIET=0; code 0 run -p hello; err_lines 2; err_has environment
unset MEDRUN_TEMP MEDRUN_PREDICT MEDRUN_QUIET MEDRUN_MODEL
code 0 run "$model" -p hello -n 12 --temp 1.5 -s 7 -q; cp "$T/out" "$T/sampled"
code 0 run "$model" -p hello -n 12 --temp 1.5 -s 7 -t 1; out_is "$T/sampled"; err_has 'seed 7 (given)'
code 0 run "$model" -p hello -n 12 --temp 1.5; err_has 'seed [0-9]* (new)'
seed=$(sed -n 's/.*seed \([0-9]*\) (new).*/\1/p' "$T/err"); cp "$T/out" "$T/sampled"
code 0 run "$model" -p hello -n 12 --temp 1.5 -s "$seed" -q; out_is "$T/sampled"
code 0 run "$model" -p hello -n 1 --temp 1.5
check 'seeds differ' [ "$seed" != "$(sed -n 's/.*seed \([0-9]*\) (new).*/\1/p' "$T/err")" ]
code 0 run "$model" -p hello -n 12 --temp 0 --raw -q; cp "$T/out" "$T/raw"
code 0 run "$model" -f "$T/hello" -n 12 --temp 0 --raw -q; out_is "$T/raw"
code 0 run "$model" -p hello -n 12 --raw --kv int8
code 0 run "$model" -p hello -n 12 --temp 0 --raw --load; out_is "$T/raw"
err_has 'load: [0-9]* MB that no other process shares, [0-9.]* s'
code 0 run "$model" -p hello -n 12 --raw --kv f32 --strict --min-p 0.01 --top-p .9 --repeat-penalty 1.1

# ---- guessing ahead changes nothing but the speed ----
for how in '--temp 0' '--temp 1.2 -s 5' '--temp .1 -s 6 --repeat-penalty 1.01' '--temp 0 --kv f32 --strict'; do
    code 0 run "$model" -f "$T/hello" -n 150 --raw $how -q; cp "$T/out" "$T/plain"
    for lookup in '0' '1' '8 -t 1' '31 -t 3' '8 -b 3' '8 -b 1'; do
        code 0 run "$model" -f "$T/hello" -n 150 --raw $how -q --lookup $lookup; out_is "$T/plain"
    done
    code 0 run "$model" -f "$T/hello" -n 150 --raw $how -q --stats --draft "$model"; out_is "$T/plain"
    err_has '; guessed [0-9]* tokens, [0-9]* right$'
done
code 0 run "$model" -f "$T/hello" -n 150 --raw --temp 0 -q; cp "$T/out" "$T/plain"
code 0 run "$model" -f "$T/hello" -n 150 --raw --temp 0 -q -b 5 --lookup 9 --draft "$model"; out_is "$T/plain"
code 3 run "$model" hello --draft "$T/none"; err_has "$T/none: cannot open"; err_lines 1
code 2 run "$model" hello --draft tools/demo/demo.mdr -q
err_has 'draft: tools/demo/demo.mdr has another vocabulary than'; err_lines 1
code 0 run "$model" -p 'again and again and again and' -n 200 --raw --temp 0 -q --stats; cp "$T/out" "$T/plain"
err_lines 1; check 'no guesses, no line about them' [ -z "$(grep guessed "$T/err")" ]
MEDRUN_LOOKUP=8; export MEDRUN_LOOKUP
code 0 run "$model" -p 'again and again and again and' -n 200 --raw --temp 0 -q --stats; out_is "$T/plain"; err_lines 1
err_has '; guessed [0-9]* tokens, [0-9]* right$'
code 0 run "$model" -p 'again and again' -n 9 --raw --temp 0 -q --stats --lookup 0
check '--lookup 0: off' [ -z "$(grep guessed "$T/err")" ]
MEDRUN_LOOKUP=all; code 2 run "$model" -p x; err_has MEDRUN_LOOKUP; unset MEDRUN_LOOKUP
code 0 show "$model" --lookup 31; out_has 'MB scratch'

# ---- stop texts are never printed, not even in part ----
found=
for s in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16; do
    "$medrun" run "$model" -p hello -n 60 --temp 1 -s $s -q >"$T/long" 2>"$T/err"
    pair=$(tr '\n\r' '  ' <"$T/long" | sed -n 's/^.*[^a-z]\([a-z][a-z]\).*$/\1/p')
    [ "$(tr -d '\000\001' <"$T/long" | wc -c)" = "$(wc -c <"$T/long")" ] || continue    # for awk
    [ -n "$pair" ] && found=$s && break
done
if [ -z "$found" ]; then skip 'stop texts: no seed made two letters'
else
    cut_at() { awk -v s="$1" 'BEGIN{RS="\001"} {i=index($0,s); printf "%s", i ? substr($0,1,i-1) : $0}' "$T/long"; }
    cut_at "$pair" >"$T/wanted"
    tail -c 1 "$T/wanted" | cmp -s - "$T/line_end" || echo >>"$T/wanted"    # an answer ends its line
    code 0 run "$model" -p hello -n 60 --temp 1 -s $found -q --stop "$pair"; out_is "$T/wanted"
    code 0 run "$model" -p hello -n 60 --temp 1 -s $found -q --stop nothing --stop "$pair"; out_is "$T/wanted"
    code 0 run "$model" -p hello -n 60 --temp 1 -s $found -q --stop "$pair nothing"; out_is "$T/long"
    MEDRUN_STOP=$pair; export MEDRUN_STOP
    code 0 run "$model" -p hello -n 60 --temp 1 -s $found -q; out_is "$T/wanted"; unset MEDRUN_STOP
fi

# ---- too long ----
ones 300 >"$T/many"
code 5 run "$model" -f "$T/many" -c 64; no_out; err_has 'prompt [0-9]* tokens > context 64'
check 'more context would help' [ -n "$(grep -- '-c asks' "$T/err")" ]
ones 700 >"$T/most"; code 5 run "$model" -f "$T/most"; err_has 'made for no longer one'; check 'no advice that cannot be followed' [ -z "$(grep -- '-c' "$T/err")" ]
check 'one line of error' [ "$(grep -c '^medrun: ' "$T/err")" = 1 ]
for s in 1 2 3 4 5; do
    "$medrun" run "$model" -p hello --temp 1 -s $s -c 64 -q >"$T/out" 2>"$T/err"; rc=$?
    [ $rc = 5 ] && break
done
if [ $rc = 5 ]; then err_has 'the answer is cut: the context of 64'; else skip 'no answer filled 64 tokens'; fi

# ---- stdout that fails ----
"$medrun" run "$model" -p hello -n 12 -q >&- 2>"$T/err"; rc=$?
check "closed stdout: exit $rc, wanted 1" [ $rc = 1 ]; err_lines 0
{ sleep 0.3; "$medrun" run "$model" -p hello -n 12 -q 2>"$T/err"; echo $? >"$T/rc"; } | :
check "reader gone: exit $(cat "$T/rc"), wanted 1" [ "$(cat "$T/rc")" = 1 ]; err_lines 0
if [ -e /dev/full ]; then
    "$medrun" run "$model" -p hello -n 12 -q >/dev/full 2>"$T/err"; rc=$?
    check "full disk: exit $rc, wanted 1" [ $rc = 1 ]; err_has 'cannot write'
    "$medrun" show "$model" >/dev/full 2>"$T/err"; rc=$?
    check "show, full disk: exit $rc, wanted 1" [ $rc = 1 ]; err_has 'cannot write'
else skip 'no /dev/full'; fi
"$medrun" logits "$model" --ids 1 -o "$T/l.f32" >&- 2>&-; check "all closed: $?" [ -s "$T/l.f32" ]

# ---- text that comes in: UTF-8 and no more than a context can hold ----
printf 'fever\n' >"$T/plain"
printf '\357\273\277fever\n' >"$T/mark"
printf '\377\376f\000e\000v\000e\000r\000' >"$T/little"
printf '\376\377\000f\000e' >"$T/big"
printf 'f\000e\000' >"$T/little_unmarked"
printf '\000f\000e' >"$T/big_unmarked"
printf 'a\nfi\350vre\n' >"$T/latin"
printf 'a\n\355\240\200\n' >"$T/half"                  # half a pair, which is no character
code 0 run "$model" -f "$T/plain" -n 3 -v -q --temp 0; cp "$T/err" "$T/shown"; cp "$T/out" "$T/answer"
code 0 run "$model" -f "$T/mark" -n 3 -v -q --temp 0; out_is "$T/answer"; check 'a byte order mark' cmp -s "$T/err" "$T/shown"
in=$T/mark; code 0 run "$model" -n 3 -v -q --temp 0; out_is "$T/answer"; in=
for f in little big little_unmarked big_unmarked; do
    code 3 run "$model" -f "$T/$f"; err_has 'found UTF-16, wanted UTF-8'; err_lines 1; no_out
    in=$T/$f; code 3 run "$model"; err_has 'stdin: line 1, byte 0: found UTF-16'; in=
    code 3 render "$model" --messages "$T/$f"; err_has 'found UTF-16'
done
code 3 run "$model" -f "$T/latin"; err_has 'line 2, byte 4: found what is no character, wanted UTF-8'
code 3 run "$model" -f "$T/half"; err_has 'line 2, byte 2'
printf '\357\273\277[{"role":"user","content":"x"}]' >"$T/m.json"
code 0 render "$model" --messages "$T/m.json"
if truncate -s 3T "$T/sparse" 2>"$T/err"; then             # from its size, before it is read
    code 5 run "$model" -f "$T/sparse"; err_has 'more than a context of'; err_lines 1; no_out
    code 3 render "$model" --messages "$T/sparse"; err_has 'the most that is read'
    code 3 tokenize "$model" -f "$T/sparse"
    rm "$T/sparse"
else skip 'no sparse file of 3 TB here'; fi
if [ -e /dev/zero ]; then
    code 5 run "$model" -f /dev/zero; err_has 'more than a context of'
    in=/dev/zero; code 5 run "$model"; code 3 tokenize "$model"; code 3 detokenize "$model"; in=
    code 3 render "$model" --messages /dev/zero
fi

# ---- people's words ----
code 0 run "$model" --template alpaca -p "a
### Response: b" -n 1; err_has 'warning: the text holds "### Response:"'
printf '[{"role":"user","content":"a ### Response: b"}]' >"$T/m.json"
code 0 render "$model" --template alpaca --messages "$T/m.json"; err_has 'warning: the text holds "### Response:"'
code 0 run "$model" -p "### Response: b" -n 1
check 'no warning where turns are control tokens' [ -z "$(grep warning "$T/err")" ]
code 0 run "$model" --template alpaca -p hi -sys '' -n 1 -v; err_has '### System:'     # empty, not the default
printf '[{"role":"system","content":""},{"role":"user","content":"hi"}]' >"$T/m.json"
cp "$T/err" "$T/shown"
code 0 render "$model" --template alpaca --ids --messages "$T/m.json"
check "-sys '' is render's empty system text" \
    [ "$(sed -n 's/^prompt, [0-9]* tokens: //p' "$T/shown")" = "$(cat "$T/out")" ]
if [ -r /proc/self/limits ] && mkfifo "$T/fifo"; then
    "$medrun" run "$model" -q -n 1 <"$T/fifo" >"$T/out" 2>&1 & pid=$!
    exec 8>"$T/fifo"
    for i in 1 2 3 4 5 6 7 8 9; do
        core=$(sed -n 's/^Max core file size *\([0-9a-z]*\) .*/\1/p' /proc/$pid/limits)
        [ "$core" = 0 ] && break; sleep 0.1
    done
    check "no core dump keeps a prompt: $core" [ "$core" = 0 ]
    echo hi >&8; exec 8>&-; wait $pid
else skip 'no /proc/self/limits'; fi

# ---- tokenize, detokenize ----
printf 'A \377\376\300 b\nfever of 39.5 \302\260C\t\351\000 z\n' >"$T/bytes"
for f in "$model" "$tok"; do
    in=$T/bytes; code 0 tokenize "$f"; in=; cp "$T/out" "$T/ids"; check 'one line' [ "$(wc -l <"$T/ids")" = 1 ]
    in=$T/ids; code 0 detokenize "$f" -; out_is "$T/bytes"; code 0 detokenize "$f"; out_is "$T/bytes"; in=
    code 0 detokenize "$f" $(cat "$T/ids"); out_is "$T/bytes"
    code 0 tokenize "$f" -f "$T/bytes"; out_is "$T/ids"
    code 0 tokenize "$f" --pieces -f "$T/bytes"; check 'a line a piece' [ "$(wc -l <"$T/out")" = "$(wc -w <"$T/ids")" ]
    check 'id, tab, piece' [ -z "$(grep -v '^[0-9]*	.' "$T/out")" ]
    code 0 tokenize "$f" -p ''; check 'no ids' [ "$(wc -w <"$T/out")" = 0 ]
    code 2 detokenize "$f" 99999999; err_has 'ids'
    for x in 1x -1 +1 1.5 0x1 99999999999999999999; do code 2 detokenize "$f" -- $x; done
done
code 0 tokenize "$tok" -p 'hello'; cp "$T/out" "$T/ids"
code 0 tokenize "$tok" -p 'hello' --bos
check '--bos adds one' [ "$(wc -w <"$T/out")" = $(($(wc -w <"$T/ids") + 1)) ]
code 0 tokenize "$tok" -p '<|eot_id|>'; n=$(wc -w <"$T/out")
code 0 tokenize "$tok" -p '<|eot_id|>' --special
if [ "$(wc -w <"$T/out")" = 1 ]; then
    check 'a control token is text otherwise' [ "$n" -gt 1 ]
    id=$(cat "$T/out"); code 0 detokenize "$tok" $id; no_out
    code 0 detokenize "$tok" --special $id; check 'its text' [ "$(cat "$T/out")" = '<|eot_id|>' ]
else skip 'the tokenizer has no <|eot_id|>'; fi
code 3 tokenize "$T/bytes" -p x
head -c 100 "$tok" >"$T/cut.bin"; code 3 tokenize "$T/cut.bin" -p x

# ---- render ----
printf '[{"role":"user","content":"is it \\"warm\\"?\\n<|eot_id|>"}]' >"$T/m.json"
code 0 render "$model" --messages "$T/m.json"; out_has 'is it "warm"?'; cp "$T/out" "$T/text"
code 0 render "$model" --messages "$T/m.json" --ids; cp "$T/out" "$T/ids"
code 0 detokenize "$tok" --special $(cat "$T/ids"); out_is "$T/text"
code 0 render --template llama3 --messages "$T/m.json"; out_has '^<|begin_of_text|>'
code 0 render "$tok" --template llama3 --messages "$T/m.json"
code 0 render "$model" --messages "$T/m.json" --no-generation-prompt
check 'shorter without the opening' [ "$(wc -c <"$T/out")" -lt "$(wc -c <"$T/text")" ]
in=$T/m.json; code 0 render "$model" --messages -; out_is "$T/text"; in=
code 2 render "$model"; err_has 'empty'
printf '[{"role":"system","content":"be brief"},{"role":"user","content":"is it warm?"}]' >"$T/plain.json"
code 0 render "$model" --messages "$T/plain.json"; cp "$T/out" "$T/text"
code 0 render "$model" 'is it warm?' -sys 'be brief'; out_is "$T/text"
code 0 render "$model" --messages "$T/plain.json" --ids; cp "$T/out" "$T/ids"
code 0 render "$model" -p 'is it warm?' --system 'be brief' --ids; out_is "$T/ids"
code 0 render "$model" 'is it warm?' -sys 'be brief' --pieces; check 'a line a piece' [ "$(cut -f 1 "$T/out" | tr '\n' ' ')" = "$(cat "$T/ids") " ]
code 0 render --template llama3 -p 'is it warm?'; out_has 'is it warm?'; code 2 render --template llama3 -p 'is it warm?' --pieces
code 0 tokenize "$model" 'is it warm?'; cp "$T/out" "$T/ids"; code 0 tokenize "$model" -p 'is it warm?'; out_is "$T/ids"
code 2 render --template llama3 --messages "$T/m.json" --ids
code 2 render --template nonsense --messages "$T/m.json"; err_has llama3
code 2 render "$tok" --messages "$T/m.json"; err_has 'template'
for x in '' '{}' '[1]' '[{"role":"user"}]' '[{"role":1,"content":"x"}]' '[{"role":"user","content":"x"}' 'x' '"x"'; do
    printf '%s' "$x" >"$T/m.json"; code 3 render "$model" --messages "$T/m.json"
done
printf '[{"role":"doctor","content":"x"}]' >"$T/m.json"; code 2 render "$model" --messages "$T/m.json"
printf '[]' >"$T/m.json"; code 2 render "$model" --messages "$T/m.json"; err_has 'none'; err_lines 1
printf '[{"role":"user","content":"Hi"}]' >"$T/m.json"
r="render --messages $T/m.json --template"
code 0 $r apertus --date 2025-01-15 --think; out_has 'Current date: 2025-01-15<|system_end|>'; out_has 'Deliberation: enabled'
code 0 $r apertus; out_has "Current date: $(date +%Y-%m-%d)<"; out_has 'Deliberation: disabled'
code 0 $r llama3.1; out_has 'Today Date: 26 Jul 2024'
code 0 $r llama3.1 --date 2025-01-05; out_has 'Today Date: 05 Jan 2025'
code 0 $r afm; out_has '<|im_start|>assistant'
code 2 $r apertus --date 15.1.2025; err_has 'YYYY-MM-DD'; err_lines 1
code 2 $r afm --think; err_has 'afm'; err_lines 1
printf '[{"type":"function","function":{"name":"lab","description":"A value.","parameters":{"properties":{"test":{"type":"string"}},"required":["test"]}}}]' >"$T/t.json"
code 2 $r apertus --tools "$T/t.json"; err_has 'medrun-lab call'; err_lines 1; no_out
l="call --render --messages $T/m.json --template"
lab 0 $l apertus --tools "$T/t.json"; out_has '^type lab = (_: {$'; out_has '^test: string$'
lab 2 $l afm --tools "$T/t.json"; err_has 'no place for tools'; err_lines 1; no_out
lab 2 call "$model" -p x; err_has 'wanted --tools'; lab 2 call --render --messages "$T/m.json"; err_has 'a model'
lab 2 $l apertus --ids; err_has 'not with --ids'
d=tools/demo/demo.mdr
printf '{"properties":{"n":{"type":"integer","minimum":10,"maximum":12}},"required":["n"]}' >"$T/s.json"
printf 'root ::= "Yes, " [a-z]{3} "."' >"$T/g.gbnf"; printf '{"properties":{"a/b":{"not":{}}}}' >"$T/not.json"
lab 0 constrain $d -q --schema "$T/s.json" 'What is gout?'; out_has '"n": *1[0-2]'
lab 0 constrain $d -q --grammar "$T/g.gbnf" 'What is gout?'; out_has '^Yes, [a-z]*\.$'
lab 0 constrain $d -q --choices 'mild,severe pain' 'What is gout?'; out_has '^mild$\|^severe pain$'
lab 0 constrain $d -q --regex '[A-C]{2}' -p x; out_has '^[A-C][A-C]$'
lab 2 constrain $d -q --schema "$T/not.json" -p x; err_has '#/properties/a~1b/not: '; err_lines 1; no_out
lab 2 constrain $d -q -p x; err_has 'wanted one of'; lab 2 constrain $d -q --regex a --choices b x; err_has 'wanted one of'
if [ -c /dev/zero ]; then lab 3 constrain $d -q --schema /dev/zero -p x; err_lines 1; no_out; fi
lab 2 constrain $d -q --regex '(' -p x; err_has 'regular expression: '; lab 3 constrain $d -q --schema "$T/none" -p x; no_out
lab 0 call --render --messages "$T/m.json" "$model"; cp "$T/out" "$T/lab"
code 0 render "$model" --messages "$T/m.json"; out_is "$T/lab"
lab 0 $l llama3 "$tok" --ids; cp "$T/out" "$T/lab"; code 0 $r llama3 "$tok" --ids; out_is "$T/lab"
printf '[{"role":"user","content":"a"},{"role":"assistant","content":null,"tool_calls":[{"type":"function","function":{"name":"lab","arguments":{"x": 1.50}}}]}]' >"$T/asks.json"
lab 0 call --render --messages "$T/asks.json" --template llama3.1; out_has '"name": "lab", "parameters": {"x": 1.5}}'
for x in llama3.1 apertus; do code 2 render --messages "$T/asks.json" --template $x; err_has 'medrun-lab call'; err_lines 1; no_out; done
code 2 render --messages "$T/asks.json" --template llama3; err_has 'content'
printf '[{"role":"user","content":"A","\\u0063ontent":"B"}]' >"$T/twice.json"
code 3 render --messages "$T/twice.json" --template llama3; err_has 'twice'; lab 3 call --render --messages "$T/twice.json" --template llama3; err_has 'twice'
printf '{}' >"$T/t.json"; lab 2 $l apertus --tools "$T/t.json"; err_has 'tools'
printf '[' >"$T/t.json"; lab 3 $l apertus --tools "$T/t.json"; err_has 'tools: JSON'
lab 3 $l apertus --tools "$T/nothing.json"; err_has 'nothing.json'
printf '[{"role":"user","content":"a"},{"role":"system","content":"b"}]' >"$T/late.json"
code 2 render --messages "$T/late.json" --template apertus; err_has 'system'; err_lines 1; no_out
code 0 render "$model" --messages "$T/m.json" --template alpaca --ids; cp "$T/out" "$T/ids"
code 0 render "$model" --messages "$T/m.json" --template alpaca --ids --bos on
check 'one id more with BOS' [ "$(wc -w <"$T/out")" = $(($(wc -w <"$T/ids") + 1)) ]
code 0 render "$model" --messages "$T/m.json" --bos off
check 'no BOS' [ "$(head -c 8 "$T/out")" = '<|start_' ]
code 2 run "$model" -p x --tools "$T/t.json"; err_has 'medrun-lab call'; err_lines 1
lab 2 call "$model" -p x --tools "$T/t.json"; err_has 'no place for tools'
lab 2 call "$model" -p x --raw --tools "$T/t.json"; err_has 'raw'

# ---- logits ----
code 0 logits "$model" --ids '1 2 3 4 5 6 7 8 9' -o "$T/last.f32"; no_out; err_lines 0
code 0 logits "$model" --ids '1 2 3 4 5 6 7 8 9' --all -b 4 -o "$T/all.f32"
row=$(wc -c <"$T/last.f32"); check 'nine rows' [ "$(wc -c <"$T/all.f32")" = $((row * 9)) ]
tail -c "$row" "$T/all.f32" | cmp -s - "$T/last.f32"; check 'the last row is the last row' [ $? = 0 ]
code 0 logits "$model" --ids '1 2 3' -o "$T/three.f32"
head -c $((row * 3)) "$T/all.f32" | tail -c "$row" | cmp -s - "$T/three.f32"; check 'the third row' [ $? = 0 ]
check 'nothing else is left' [ ! -e "$T/last.f32.partial" ]
code 2 logits "$model" --ids '' -o "$T/x"; code 2 logits "$model" --ids '1 x' -o "$T/x"
code 2 logits "$model" -o "$T/x"; code 2 logits "$model" --ids 1
code 1 logits "$model" --ids 1 -o "$T/none/x"; err_has 'cannot write'
code 5 logits "$model" --ids "$(i=0; while [ $i -lt 9000 ]; do printf '1 '; i=$((i + 1)); done)" -o "$T/x"

code 0 logits "$model" --ids '1 2 3' --top 4; cp "$T/out" "$T/top"; check 'four and a line above' [ "$(wc -l <"$T/top")" = 5 ]
out_has '^rank  *id  piece  *logit  probability$'; out_has '^   1 '; out_has '^   4 '
code 0 logits "$model" --ids '1 2 3' --top 2 -o "$T/again.f32"; check 'the same numbers as without' cmp -s "$T/three.f32" "$T/again.f32"
code 0 tokenize "$model" 'once more' --bos; code 0 logits "$model" --ids "$(cat "$T/out")" --top 9; cp "$T/out" "$T/top"
code 0 logits "$model" 'once more' --top 9; out_is "$T/top"; code 0 logits "$model" -p 'once more' --top 9; out_is "$T/top"
code 0 logits "$model" x --top 100; awk 'NR > 1 { sum += $NF; if (NR > 2 && $NF > last) exit 1; last = $NF } END { exit !(sum > 0.3 && sum <= 1.0001) }' "$T/out"
check 'probabilities go down, and are no more than 1 together' [ $? = 0 ]
code 2 logits "$model" x --ids '1 2' --top 3; err_has 'both'
code 0 logits "$model" 'once more' --top 2; cp "$T/out" "$T/top"
MEDRUN_IDS='1 2 3' code 0 logits "$model" 'once more' --top 2; out_is "$T/top"
code 0 logits "$model" --ids '1 2 3' --top 2; cp "$T/out" "$T/top"
MEDRUN_PROMPT='once more' code 0 logits "$model" --ids '1 2 3' --top 2; out_is "$T/top"
for x in 0 101 x; do code 2 logits "$model" x --top $x; done
code 2 logits "$model" x; err_has '--top N or -o'; code 2 logits "$model" x --all --top 3; code 2 chat "$model" --top 3
code 0 run "$model" hello -n 4 --temp 0 --top 3 -q
check 'three lines for each token' [ "$(wc -l <"$T/out")" = 12 ]; check 'two of them below it' [ "$(grep -c '^    ' "$T/out")" = 8 ]
code 0 run "$model" hello -n 4 --temp 0 --top 1 -q; check 'nothing below' [ "$(wc -l <"$T/out")" = 4 ]
code 0 run "$model" hello -n 12 --temp 1.5 -s 7 --top 2 -q --lookup 4; sed -n '/^    /!p' "$T/out" | wc -l >"$T/n"
code 0 run "$model" hello -n 12 --temp 1.5 -s 7 --top 1 -q; check 'the same tokens' [ "$(sed -n '/^    /!p' "$T/out" | wc -l)" = "$(cat "$T/n")" ]

# ---- show, verify, doctor ----
code 0 show "$model"; out_has '^licence'; out_has 'key-value cache'
export=$(dirname "$medrun")/medrun-export
if "$export" tests/fixtures/arcee-yarn "$T/afm.mdr" --template afm >"$T/err" 2>&1; then
    code 0 show "$T/afm.mdr"; out_has '^system  *The assistant is AFM-4.5B'    # the template's own
fi
check 'show is one screen' [ "$(wc -l <"$T/out")" -le 23 ]; check 'and has no hashes' [ -z "$(grep '[0-9a-f]\{64\}' "$T/out")" ]
code 0 show "$model" -v; out_has '^hash  *[0-9a-f]*$'; out_has '^sources'
code 0 show "$model" -c 32; out_has 'context 32, f16 (with --kv int8'
code 0 show "$model" -c 32 --kv int8; out_has 'context 32, int8 (with --kv f16'
code 2 show "$model" -c 9999999
code 0 verify "$model"; out_has '^tensors  *\([0-9]*\) of \1 '; out_has '^logits'; out_has '^tokenizer  *1 of 1'
code 0 verify "$model" -v; out_has 'layers.0.q: the same'
code 0 verify -q "$model"; no_out; err_lines 0
size=$(wc -c <"$model") tensor=
for percent in 20 30 40 50 60 70 80; do
    cp "$model" "$T/bad.mdr"
    printf '\125' | dd of="$T/bad.mdr" bs=1 seek=$((size / 100 * percent)) conv=notrunc 2>/dev/null
    cmp -s "$model" "$T/bad.mdr" && continue
    "$medrun" verify "$T/bad.mdr" >"$T/out" 2>"$T/err"; rc=$?
    case $rc in 3) ;; 4) tensor=yes; out_has 'DIFFERS: expected [0-9a-f]*, found';; *) bad "a changed byte: exit $rc";; esac
done
check 'a changed weight is found' [ -n "$tensor" ]
lab 0 doctor; out_has 'kernels'; out_has 'as scalar'
lab 0 bench "$model" -p 32 -n 4 -r 2; out_has '| pp32 |'; out_has '| tg4 '; out_has 'GB/s'
lab 0 bench "$model" -p 16 -n 3 -r 1 -o json; out_has '"pp":{"n":16,"tps":'; out_has '"tg":{"n":3,'
lab 0 bench "$model" -p 9 -n 3 -r 2 -d 40 --kv int8; out_has '| pp9 @ d40 | '; out_has 'kv int8'
lab 0 bench "$model" -p 9 -n 3 -r 1 -d 40 -o json; out_has '"kv":"f16","depth":40,'
lab 2 bench "$model" -p 0 -n 0; lab 2 bench "$model" -o xml
lab 0 bench "$model" -p 9.,+1e1 -n 0 -r 1; check 'numbers as everywhere' [ "$(grep -c '^| pp' "$T/out")" = 2 ]
for wrong in '' 1, ,1 1,,2 x 1x -1 1.5 ' 5' 0x5 nan 1048577 "$(seq -s , 17)"; do lab 2 bench "$model" -p "$wrong"; err_has 'commas between'; err_lines 1; done
lab 0 bench "$model" -p 0,9,12 -n 2,0 -d 0,40 -r 1; check 'six rows' [ "$(grep -c '^| [pt][pg]' "$T/out")" = 6 ]
check 'columns are padded' [ "$(grep '^|' "$T/out" | sed 's/±/+/' | awk '{ print length($0) }' | sort -u | wc -l)" = 1 ]
lab 0 bench "$model" -p 9,12 -n 0 -d 0,40 -r 1 -o csv; check 'a head and four lines' [ "$(wc -l <"$T/out")" = 5 ]
check 'as many fields in each line' [ "$(awk -F , '{ print NF }' "$T/out" | sort -u)" = 16 ]
lab 0 bench "$model" -p 0 -n 2 -r 1 -o json; check 'no pp' [ "$(grep -c '"pp"' "$T/out")" = 0 ]; out_has '"tg":{"n":2,'
lab 0 bench "$model" -p 9,12 -n 2 -d 0,40 -r 1 -o json; check 'a line for each depth' [ "$(wc -l <"$T/out")" = 2 ]
out_has '"pp":[[]{"n":9,'; out_has '},{"n":12,'; out_has '"depth":40,'
lab 5 bench "$model" -p 1000000

# what another program does
for word in bench doctor replay record call; do code 2 $word "$model" -r 3; err_has "medrun-lab $word"; err_lines 1; done; code 2 compare; err_has 'medrun-lab compare'
for word in $("$lab" --help | sed -n 's/^medrun-lab \([a-z]*\).*/\1/p'); do
    case $word in help|version) continue;; esac
    code 2 $word; err_has "^medrun: $word: medrun-lab $word does this\$"; no_out; lab 0 help $word
done
for word in --schema --grammar --regex --choices; do code 2 run "$model" -p x $word y; err_has "$word: medrun-lab constrain does this"; done
for shell in bash zsh fish; do lab 0 completion $shell; out_has '_medrun'; done; lab 2 completion tcsh; err_has 'wanted bash'
lab 0 compare "$model"; out_has '^proof 1: states no reference$'; lab 3 compare "$T/none.mdr"; lab 0 help compare; out_has '--threads'
for word in export eval serve explain; do code 2 $word; err_has "medrun-$word"; done
code 2 run "$model" -p x --record "$T/r.json"; err_has 'medrun-lab record'
lab 0 help; out_has 'medrun-lab replay'; lab 0 help bench; out_has '--depth'; lab 0 --version; lab 2; lab 2 rnu
lab 2 record "$model" -p x; lab 2 record "$T/r.json" -p x; lab 2 bench "$model" --temp 1
# the instruction set that the environment names
MEDRUN_KERNELS=scalar code 0 run "$model" -p x -n 1; err_has 'scalar kernels'
MEDRUN_KERNELS= code 0 run "$model" -p x -n 1; err_has ' kernels, '
MEDRUN_KERNELS=sse9 code 2 run "$model" -p x -n 1; err_has 'kernels: found "sse9", this machine can run:.* scalar'
MEDRUN_KERNELS=sse9 lab 2 doctor; err_has 'found "sse9"'; err_lines 1
# a variable holds for the option of its meaning, not for another of the same name
MEDRUN_PROMPT=hello lab 0 bench "$model" -p 8 -n 2 -r 1; MEDRUN_PREDICT=-1 lab 0 bench "$model" -p 8 -r 1 -n 2
MEDRUN_PROMPT=hello lab 0 bench "$model" -n 2 -r 1; MEDRUN_BENCH_PROMPT=9 lab 0 bench "$model" -n 2 -r 1; out_has '| pp9 '
lab 0 help bench; out_has 'MEDRUN_BENCH_PROMPT is for --prompt'; code 0 help tokenize; out_has 'MEDRUN_TOKENIZE_BOS is for --bos'
MEDRUN_OUTPUT=json lab 0 bench "$model" -p 8 -n 2 -r 1; out_has '"pp":{"n":8,'
MEDRUN_IDS='1 2 3' lab 0 $l llama3 "$tok"; cp "$T/out" "$T/text"; lab 0 $l llama3 "$tok"; out_is "$T/text"
MEDRUN_RENDER_IDS=1 lab 0 $l llama3 "$tok"; cp "$T/out" "$T/ids"; lab 0 $l llama3 "$tok" --ids; out_is "$T/ids"
lab 0 help call; out_has 'MEDRUN_RENDER_IDS is for --ids'
code 0 help run; check 'run has no names of its own' [ "$(grep -c 'MEDRUN_.* is for' "$T/out")" = 0 ]
MEDRUN_BOS=auto code 0 tokenize "$model" -p x; MEDRUN_TOKENIZE_BOS=1 code 0 tokenize "$model" -p x

# ---- record, replay ----
lab 0 record "$model" "$T/r.json" -p hello -n 20 --temp 9 -s 11 --top-p .95 -q; cp "$T/out" "$T/wanted"
check 'a record is private' [ "$(ls -l "$T/r.json" | cut -c1-10)" = '-rw-------' ]
lab 0 replay "$T/r.json"; out_has '^same: '
lab 0 replay "$T/r.json" -m "$model" -t 1; out_has '^same: '
sed 's/"answer": \[[0-9]*/"answer": [7/' "$T/r.json" >"$T/r2.json"
cmp -s "$T/r.json" "$T/r2.json" || { lab 4 replay "$T/r2.json"; out_has 'token 1 of the answer: expected 7 '; }
sed 's/"logits_sha256": "../"logits_sha256": "zz/' "$T/r.json" >"$T/r2.json"; lab 4 replay "$T/r2.json"
sed 's/"model_hash": "....../"model_hash": "000000/' "$T/r.json" >"$T/r2.json"; lab 4 replay "$T/r2.json"
sed 's/"--seed": "11"/"--seed": "12"/' "$T/r.json" >"$T/r2.json"; lab 4 replay "$T/r2.json"
sed 's/"--temp": "/"--temp": "x/' "$T/r.json" >"$T/r2.json"; lab 3 replay "$T/r2.json"
sed 's/"--temp"/"--record"/' "$T/r.json" >"$T/r2.json"; lab 3 replay "$T/r2.json"
sed 's/"prompt": \[/"prompt": [-1,/' "$T/r.json" >"$T/r2.json"; lab 3 replay "$T/r2.json"
sed 's/"answer"/"reply"/' "$T/r.json" >"$T/r2.json"; lab 3 replay "$T/r2.json"
for n in 1 60 200 400; do head -c $n "$T/r.json" >"$T/r2.json"; lab 3 replay "$T/r2.json"; done
lab 0 record -m "$model" "$T/r2.json" -p hello -n 5 --kv int8; err_has 'kv int8'
lab 0 replay "$T/r2.json"; out_has '^same: '
lab 3 replay "$T/none.json"; lab 2 replay
lab 1 record "$model" "$T/none/r.json" -p hello -n 2 -q; err_has 'cannot write'

# ---- a prefix that was processed before ----
ones 80 >"$T/doc"; cp "$T/doc" "$T/doc1"; echo 'what is it?' >>"$T/doc1"; cp "$T/doc" "$T/doc2"; echo 'who says so?' >>"$T/doc2"
P=$T/prefix
for how in '--temp 0' '--temp 1.3 -s 3 --lookup 8' '--temp 0 --kv f32' '--temp 0 --raw -b 9'; do
    code 0 run "$model" -f "$T/doc1" -n 9 $how -q; cp "$T/out" "$T/one"
    code 0 run "$model" -f "$T/doc2" -n 9 $how -q; cp "$T/out" "$T/two"
    code 0 run "$model" -f "$T/doc1" -n 9 $how --save-prefix "$P"; out_is "$T/one"; err_has '^prefix: [0-9]* tokens written to'
    check 'a prefix is private' [ "$(ls -l "$P" | cut -c1-10)" = '-rw-------' ]
    check 'nothing else is left' [ ! -e "$P.partial" ]
    code 0 run "$model" -f "$T/doc2" -n 9 $how --load-prefix "$P"; out_is "$T/two"
    taken=$(sed -n 's/^prefix: \([0-9]*\) of \([0-9]*\) tokens taken from .*/\1/p' "$T/err")
    check "the text they share was taken: $taken" [ "${taken:-0}" -ge 80 ]
    code 0 run "$model" -f "$T/doc1" -n 9 $how --load-prefix "$P"; out_is "$T/one"
    left=$(sed -n 's/^prefix: \([0-9]*\) of \([0-9]*\) tokens taken from .*/$((\2 - \1))/p' "$T/err"); eval "left=${left:-99}"
    check "all but a part of a block was taken: $left left" [ "$left" -ge 1 ] && [ "$left" -le 15 ]
    code 0 run "$model" -f "$T/doc2" -n 9 $how --load-prefix "$P" --save-prefix "$T/again" -q; out_is "$T/two"; err_lines 0
    code 2 run "$model" -f "$T/doc2" -n 9 $how --load-prefix "$P" --save-prefix "$P" -q; no_out; err_has 'read by the same command'
    code 0 run "$model" -f "$T/doc2" -n 9 $how --load-prefix "$P" -c 250 -t 1 -q; out_is "$T/two"
done
code 0 run "$model" -f "$T/doc" -n 0 --save-prefix "$P"; no_out
lab 0 record "$model" "$T/r.json" -f "$T/doc2" -n 9 --temp 1 -s 1 --load-prefix "$P" -q
lab 0 replay "$T/r.json"; out_has '^same: '
code 0 run "$model" --raw -f "$T/doc" -n 0 --save-prefix "$T/raws"
code 0 run "$model" --raw -p '!' -n 1 --load-prefix "$T/raws" --bos off; err_has '^prefix: the prompt shares fewer than 16 tokens with'
MEDRUN_LOAD_PREFIX=$P; export MEDRUN_LOAD_PREFIX; code 0 run "$model" -f "$T/doc2" -n 1; err_has '^prefix: [1-9]'; unset MEDRUN_LOAD_PREFIX
in=$T/doc2; code 0 "$model" -n 1 --load-prefix "$P"; err_has '^prefix: [1-9]'; in=
bad_prefix() { code 3 run "$model" -f "$T/doc2" -n 1 -q "$@"; no_out; err_lines 1; }
bad_prefix --load-prefix "$P" --template none; err_has 'template llama3, this session has none'
bad_prefix --load-prefix "$P" --raw; err_has 'template llama3, this session has raw'
bad_prefix --load-prefix "$P" --kv f32; err_has '--kv f16, this session has --kv f32'
bad_prefix --load-prefix "$P" --kv f16 --strict; err_has '--strict'
bad_prefix --load-prefix "$T/none"; err_has 'none: cannot open'
bad_prefix --load-prefix "$T"; err_has 'not a regular file'
bad_prefix --load-prefix "$T/empty"; err_has 'not a session or prefix'
bad_prefix --load-prefix "$T/doc"; err_has 'not a session or prefix'
bad_prefix --load-prefix "$model"; err_has 'not a session or prefix'
mkfifo "$T/pipe" 2>/dev/null && bad_prefix --load-prefix "$T/pipe"
size=$(wc -c <"$P")
for n in 1 8 40 103 104 105 300 $((size / 2)) $((size - 8)) $((size - 1)); do
    head -c "$n" "$P" >"$T/cut"; bad_prefix --load-prefix "$T/cut"
done
for at in 0 8 39 40 63 64 68 72 80 104 150 $((size / 3)) $((size / 2)); do
    cp "$P" "$T/cut"; printf '\377' | dd of="$T/cut" bs=1 seek="$at" conv=notrunc 2>/dev/null
    cmp -s "$P" "$T/cut" || bad_prefix --load-prefix "$T/cut"
done
other=$2/llama-plain-int8.mdr
if [ -d "$1" ] && [ -e "$other" ]; then
    code 3 run "$other" -f "$T/doc2" -n 1 -q --load-prefix "$P"; err_has 'another checkpoint'; err_lines 1
else skip 'a prefix of another model'; fi
bad_place() { code 1 run "$model" -f "$T/doc2" -n 1 -q --save-prefix "$1"; no_out; err_lines 1; err_has 'cannot write'; }
bad_place "$T/none/x"; bad_place "$T"; bad_place /dev/null; check '/dev/null is still there' [ -c /dev/null ]
if [ -e /dev/full ]; then bad_place /dev/full; check '/dev/full is still there' [ -c /dev/full ]; fi
cp "$P" "$T/kept"
(trap '' XFSZ; ulimit -f 8; "$medrun" run "$model" -f "$T/doc2" -n 1 -q --save-prefix "$P" >"$T/out" 2>/dev/null); rc=$?
check "a full disk: exit $rc, wanted 1" [ $rc = 1 ]; no_out
check 'what was there stays' cmp -s "$P" "$T/kept"; check 'and nothing else' [ ! -e "$P.partial" ]
lab 2 replay "$T/r.json" --load-prefix "$P"; code 2 show "$model" --save-prefix "$P"

# ---- with Python: proofs that differ, hostile names, the terminal ----
if python3 -c 'import pty' 2>/dev/null; then
    cat >"$T/terminal.py" <<'PY'
import fcntl, hashlib, json, os, pty, re, select, signal, struct, subprocess, sys, termios, time
medrun, model, T, lab = sys.argv[1:]
passed = failed = skipped = 0
signal.signal(signal.SIGINT, signal.SIG_DFL)    # a shell's job in the background has it ignored, and so would all that it starts

def check(what, ok, seen=b''):
    global passed, failed
    if ok: passed += 1
    else:
        failed += 1
        print('FAILED:', what, repr(seen)[-600:])

def all_shown(pid, fd):
    """What the program PID shows on the terminal FD until it ends."""
    out = b''
    while True:
        try: more = os.read(fd, 4096)
        except OSError: break
        if not more: break
        out += more
    os.waitpid(pid, 0); os.close(fd)
    return out

class Chat:
    """medrun on a terminal of 60 columns and more lines than it prints, started by a shell that afterwards shows the terminal's state."""
    def __init__(self, *args, env={}, model=model, columns=60):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            e = dict(os.environ, TERM='xterm', **env)
            os.execvpe('sh', ['sh', '-c', 'trap : INT; sh -c \'echo "pid=$$"; exec "$@"\' x "$@"; echo "rc=$?"; stty -a; echo THE END',
                              'x', medrun, model, *args], e)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
        self.start = self.drawn()

    def read(self, done, wait=20):
        """What comes until DONE says so; waits no longer than WAIT for the next bytes."""
        out = b''
        while not done(out) and select.select([self.fd], [], [], wait)[0]:
            try: more = os.read(self.fd, 65536)
            except OSError: break
            if not more: break
            out += more
        return out

    def drawn(self):
        """What comes until a line is drawn, the cursor stands in it, and nothing follows."""
        out = b''
        while True:
            more = self.read(lambda x: re.search(rb'\x1b\[K\r\x1b\[\d+C$', x))
            out += more
            if not more or not select.select([self.fd], [], [], 0.1)[0]: return out

    def say(self, keys):
        os.write(self.fd, keys)
        return self.drawn()

    def end(self, keys=b''):
        if keys: os.write(self.fd, keys)
        out = self.read(lambda x: b'THE END' in x)
        os.close(self.fd)                           # which ends a program that is still there
        os.waitpid(self.pid, 0)
        return out

def ended_well(what, out, rc):
    check(what + ': exit %d' % rc, b'rc=%d\r\n' % rc in out, out)
    check(what + ': the terminal is restored', all(re.search(rb'[\s]%s[\s;]' % x, out) for x in
          (b'icanon', b'echo', b'isig', b'icrnl')), out)

unbroken = lambda out: re.sub(rb'\s+', b' ', out)      # lines are broken between words

def figures(out):                                   # prompt, answer, context of /stats
    m = re.search(rb'prompt (\d+) tokens.*answer (\d+) tokens.*context (\d+) of (\d+)', unbroken(out))
    return [int(x) for x in m.groups()] if m else [0, 0, 0, 0]

# the line
c = Chat('-n', '4', '--temp', '0', '-v')
check('the notice', b'For research and education. Not a clinician' in c.start, c.start)
check('colour', b'\x1b[33m' in c.start and b'\x1b[1m> ' in c.start, c.start)
def sees(what, keys, text):
    out = c.say(keys)
    dump = out.split(b'prompt, ', 1)[-1].replace(b'\r', b'')
    check(what, text in dump, out)
sees('left', b'helo\x1b[Dl\r', b'hello')
sees('history', b'\x1b[A!\r', b'hello!')
sees('history twice, and back', b'\x1b[A\x1b[A\x1b[B?\r', b'hello!?')
sees('home, end', b'bcd\x1b[Ha\x1b[Fe\r', b'abcde')
sees('Ctrl-A, Ctrl-E', b'bcd\x01a\x05e\r', b'abcde')
sees('Ctrl-U', b'wrong\x15right one\r', b'right one')
sees('Ctrl-K', b'keep this not that' + b'\x1b[D' * 9 + b'\x0b\r', b'keep this')
sees('Ctrl-W', b'one two three \x17four\r', b'one two four')
sees('backspace over UTF-8', b'a\xc3\xa9\xe6\x97\xa5\xf0\x9f\x98\x80\x7f\x7f\x7fb\r', b'ab')
sees('delete', b'axb\x1b[D\x1b[D\x1b[3~\r', b'ab')
sees('an accent in the middle', b'caf\x1b[D\x1b[D\xc3\xa9\r', b'c\xc3\xa9af')
sees('unknown keys do nothing', b'a\x1b[15~\x1b[1;5C\x1bOPb\x00\x1b[99;99zc\r', b'abc')
sees('a paste of lines is one message', b'\x1b[200~first line\nsecond\rthird\x1b[201~\r', b'first line\nsecond\nthird')
out = c.say(b'"""one\r')
sees('several lines', b'two"""\r', b'one\ntwo')
sees('a space before /', b' /help\r', b'/help')
long = b'0123456789' * 30
out = c.say(long)
check('a long line stays on its row', max(len(x) for x in re.findall(rb'[0-9]+', out.split(b'm> ')[-1])) <= 57, out)
out = c.say(b'\x01')
check('nor does it pass the end of the row', max(len(x) for x in re.findall(rb'[0-9]+', out.split(b'm> ')[-1])) <= 57, out)
sees('a long line arrives whole', b'\x1b[C\x1b[C\x1b[C\r', long)
wide = '日本語'.encode() * 30
out = c.say(wide)
check('two columns each stay on the row, too', max(len(x) for x in re.findall(rb'(?:[\xe3-\xe9]..)+', out)) <= 28 * 3, out)
check('and the cursor behind them', int(re.findall(rb'\x1b\[(\d+)C', out)[-1]) <= 59, out)
sees('they arrive whole', b'\x01\x1b[C\x1b[D\r', wide)
c.say(b''.join(b'/x%d\r' % i for i in range(105)))
out = c.say(b'\x1b[A' * 200 + b'\r')
check('100 lines are remembered', b'unknown command /x5;' in unbroken(out), out)
check('unknown command', b'nearest is /help' in unbroken(c.say(b'/hlep\r')))
check('/help', b'/system [TEXT]' in c.say(b'/help\r'))
check('/save without a file', b'wanted FILE' in c.say(b'/save\r'))
check('/load of nothing', b'cannot open' in c.say(b'/load %s/nothing\r' % T.encode()))
check('/show', b'key-value cache' in c.say(b'/show\r'))
ended_well('/bye', c.end(b'/bye\r'), 0)
c = Chat('-q', '-n', '2', env={'NO_COLOR': '1'})
check('NO_COLOR', b'\x1b[33m' not in c.start and b'\x1b[1m' not in c.start and b'Not a clinician' in c.start, c.start)
ended_well('Ctrl-D', c.end(b'\x04'), 0)
c = Chat('-n', '2')
check('Ctrl-C once', b'leaves' in c.say(b'abc\x03'))
ended_well('Ctrl-C twice', c.end(b'\x03'), 130)
c = Chat('-n', '2')
os.kill(int(re.search(rb'pid=(\d+)', c.start).group(1)), signal.SIGTERM)
ended_well('SIGTERM', c.end(), 128 + signal.SIGTERM)

# the conversation: saved, cleared and loaded it goes on as it would have
c = Chat('-n', '5', '--temp', '0')
c.say(b'one\r'); before = figures(c.say(b'/stats\r')); second = c.say(b'two\r'); after = figures(c.say(b'/stats\r'))
c.say(b'/clear\r'); check('/clear', figures(c.say(b'/stats\r'))[2] == 0)
c.say(b'one\r'); c.say(b'/save %s/session\r' % T.encode()); c.say(b'/clear\r')
check('a session is private', os.stat(T + '/session').st_mode & 0o77 == 0)
out = c.say(b'/load %s/session\r' % T.encode())
check('/load', figures(c.say(b'/stats\r'))[2] == before[2], out)
check('it goes on', c.say(b'two\r') == second, second)
check('it is as long', figures(c.say(b'/stats\r'))[2] == after[2])
open(T + '/note', 'w').write('two\n')
c.say(b'/clear\r'); c.say(b'one\r')
out = c.say(b'/read %s/note\r' % T.encode())
check('/read', out.split(b'\x1b[?2004l', 1)[1] == second.split(b'\x1b[?2004l', 1)[1], out)
check('/read of nothing', b'cannot open' in c.say(b'/read %s/nothing\r' % T.encode()))
c.say(b'/system be kind\r'); c.say(b'one\r')
check('/system', figures(c.say(b'/stats\r'))[2] > before[2])
ended_well('conversation', c.end(b'\x04'), 0)

# each command says what it did; a message is taken back, or answered again
c = Chat('-n', '5', '--temp', '0', '-q', env={'HOME': T})
said = lambda keys: unbroken(c.say(keys)).split(b'\x1b[?2004l', 1)[-1].split(b'\x1b[?2004h')[0].strip()
check('/undo of nothing', said(b'/undo\r') == b'/undo: nothing was said')
check('/retry of nothing', said(b'/retry\r') == b'/retry: nothing was said')
one = said(b'one\r'); length = figures(c.say(b'/stats\r'))[2]
check('/retry', said(b'/retry\r') == one and figures(c.say(b'/stats\r'))[2] == length)
c.say(b'two\r'); out = said(b'/undo\r')
check('/undo', re.fullmatch(rb'took back the last message and its answer; \d+ tokens are left', out), out)
two = said(b'two\r'); longer = figures(c.say(b'/stats\r'))[2]
c.say(b'/undo\r'); c.say(b'/undo\r'); check('/undo twice', figures(c.say(b'/stats\r'))[2] == 0)
check('it begins anew', said(b'one\r') == one and said(b'two\r') == two and figures(c.say(b'/stats\r'))[2] == longer)
out = said(b'/save ~/s3 \r'); check('/save', out == b'saved %d tokens to %s/s3' % (longer, T.encode()), out)
check('/clear', said(b'/clear\r') == b'the conversation is empty now')
out = said(b'/load ~/s3\r'); check('/load', out.startswith(b'loaded %d tokens from %s/s3 You: two Model: ' % (longer, T.encode())), out)
check('/load shows the last turn only', b'one' not in out.split(b'You:')[1], out)
check('/retry of what was loaded', said(b'/retry\r') == b'/retry: nothing was said')
out = said(b'/text ~/talk.txt\r'); check('/text', out == b'wrote the conversation to %s/talk.txt' % T.encode(), out)
talk = open(T + '/talk.txt').read()
check('the talk as text', re.fullmatch(r'(?s)medrun: a talk with [^\n]*\n\nYou: one\n\nModel: .*\n\nYou: two\n\nModel: .*\n\n', talk) and '<|' not in talk, talk.encode())
check('it is private', os.stat(T + '/talk.txt').st_mode & 0o77 == 0)
check('/text once more', b'wrote' in said(b'/text ~/talk.txt\r'))
open(T + '/mine', 'w').write('my own notes'); out = said(b'/text ~/mine\r')
check("a stranger's file stays", b'exists and is not a talk' in out and open(T + '/mine').read() == 'my own notes', out)
out = said(b'/save ~/mine\r'); check('/save neither', b'exists and is not' in out and open(T + '/mine').read() == 'my own notes', out)
os.symlink('mine', T + '/linked'); check('nor through a link', b'symbolic link' in said(b'/text ~/linked\r'))
check('/text into nothing', b'cannot write' in said(b'/text ~/none/x\r'))
check('/set', said(b'/set temp 0.4\r') == b'temp is 0.4 now' and said(b'/set --temperature=0\r') == b'temp is 0 now')
for bad in (b'temp', b'temp hot', b'temp -1', b'ctx 5', b'nothing 5', b''):
    out = said(b'/set ' + bad + b'\r'); check('/set %r' % bad, b'wanted' in out and b'now' not in out, out)
c.say(b'/clear\r'); c.say(b'/set temp 0\r'); check('a wrong /set changed nothing', said(b'one\r') == one)
c.say(b'/set predict 2\r'); c.say(b'again\r'); check('/set predict', figures(c.say(b'/stats\r'))[1] == 2)
c.say(b'/set temp 1.5\r'); c.say(b'/set predict 5\r')
def seeded():
    c.say(b'/clear\r'); c.say(b'/set seed 7\r'); return said(b'one\r')
check('/set seed', seeded() == seeded())
check('/clear takes no text', b'wanted no more' in said(b'/clear all\r'))
ended_well('/q', c.end(b'/q\r'), 0)
for leave in (b'exit', b'quit', b'/exit', b'/quit'): c = Chat('-n', '2'); ended_well(leave.decode(), c.end(leave + b'\r'), 0)
c = Chat('-n', '3', '-v', '--temp', '0', '-q')
check('exit in a text is a text', b'how do I exit' in c.say(b'how do I exit\r').split(b'prompt, ', 1)[-1]); check('/?', b'/retry' in c.say(b'/?\r'))
open(T + '/a b.txt', 'w').write('the note\n')
for typed, wanted in ((b'/read %s/note what is it?', b'what is it?\n\ntwo<'), (b'/read %s/a b.txt what is it?', b'what is it?\n\nthe note<'), (b'/read %s/a b.txt', b'\n\nthe note<'), (b'/read %s/note', b'\n\ntwo<')):
    out = c.say(typed % T.encode() + b'\r').replace(b'\r', b'')
    if b'<|eot_id|>' in out: check('%r' % typed, wanted in out.split(b'prompt, ', 1)[-1], out)
check('/read of nothing', b'nothing: cannot open' in unbroken(c.say(b'/read %s/nothing what is it?\r' % T.encode())))
out = c.say(b'/system be kind\r'); check('/system', b'the conversation is empty now, its system text is new' in unbroken(out), out)
check('it is said', b'be kind' in c.say(b'one\r').split(b'prompt, ', 1)[-1]); c.end(b'\x04')

# Tab and Ctrl-L
os.mkdir(T + '/tab'); os.mkdir(T + '/tab/folder')
for name in ('alpha one', 'alpha two', 'be*ta', 'bela'): open(T + '/tab/' + name, 'w').write(name + '\n')
c = Chat('-n', '2', '-v', env={'HOME': T + '/tab'})
line = lambda out: re.findall(rb'> (?:\x1b\[0m)?([^\r\x1b]*)\x1b\[K\r', out)[-1]
home = T.encode() + b'/tab/'
def tab(what, keys, wanted):
    out = c.say(keys); check('Tab: ' + what, line(out).endswith(wanted), out); c.say(b'\x15')
tab('a command', b'/sy\t', b'/system ')
tab('commands that differ', b'/s\t', b'/s')
tab('as far as they agree', b'/s\tt\t', b'/stats ')
tab('what is no command', b'/zz\t', b'/zz'); tab('not in a text', b'he\tllo', b'hello')
c2 = c; c = Chat('-n', '2', '-v', env={'HOME': T + '/tab'}, columns=200)
tab('a path', b'/read ~/be*\t', b'/read ' + home + b'be*ta'); tab('another', b'/read ~/bel\t', b'/read ' + home + b'bela')
tab('a folder', b'/read ~/f\t', home + b'folder/'); tab('two paths', b'/load ~/al\t', home + b'alpha '); tab('none', b'/load ~/zz\t', b'~/zz')
out = c.say(b'/load ~/al\t\t'); check('a list of them', home + b'alpha one  ' + home + b'alpha two' in out, out); c.say(b'\x15')
out = c.say(b'/s\t'); check('a list of commands', b'/system  /set  /save  /stats  /show' in out, out); c.say(b'\x15')
out = c.say(b'/read ~/bel\t?\x7f\r'); check('and it is read', b'bela' in out.split(b'prompt, ', 1)[-1], out)
out = c.say(b'abc\x0c'); check('Ctrl-L', b'\x1b[H\x1b[2J' in out and line(out) == b'abc', out)
ended_well('Tab', c.end(b'\x15\x04'), 0); c2.end(b'\x04')

# words are not broken by the end of a line; the demo model speaks English
demo = 'tools/demo/demo.mdr'
question = 'What are the symptoms of diabetes?'
rc = subprocess.run([medrun, 'run', demo, question, '-q'], capture_output=True, stdin=subprocess.DEVNULL)
plain = rc.stdout
check('to a pipe no line is broken', plain.count(b'\n') == 1 and plain.endswith(b'.\n'), plain)
for columns in (30, 60, 120, 200, 250):
    for env in ({}, {'TERM': 'dumb'}, {'LANG': 'C', 'NO_COLOR': '1'}):
        pid, fd = pty.fork()
        if pid == 0:
            time.sleep(0.2)
            os.execvpe(medrun, [medrun, 'run', demo, question, '-q'], dict(os.environ, **env))
        fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', 24, columns, 0, 0))
        out = all_shown(pid, fd)
        lines = out.replace(b'\r', b'').split(b'\n')
        check('%d columns %s: the same words' % (columns, env), b' '.join(b' '.join(lines).split()) == plain.strip(), out)
        check('%d columns: no line is longer' % columns, max(map(len, lines)) <= min(columns, 200), out)
        check('%d columns: no line could be longer' % columns, all(len(a) + 1 + len(b.split()[0]) > columns for a, b in zip(lines, lines[1:]) if b), out)

# a prefix: the first message takes from it, a cleared conversation again; a bad one is said first
plain = Chat('-n', '5', '--temp', '0', '-q')
first, second = plain.say(b'one and two and one and two and one and two and three\r'), plain.say(b'four\r')
plain.end(b'\x04')
c = Chat('-n', '5', '--temp', '0', '-q', '--save-prefix', T + '/chat.prefix')
check('saving a prefix', c.say(b'one and two and one and two and one and two and three\r') == first and os.path.exists(T + '/chat.prefix'))
os.remove(T + '/chat.prefix')
check('once', c.say(b'four\r') == second and not os.path.exists(T + '/chat.prefix'))
c.say(b'/clear\r'); c.say(b'one and two and one and two and one and two and five\r'); c.say(b'/save %s/chat.prefix\r' % T.encode()); c.end(b'\x04')
c = Chat('-n', '5', '--temp', '0', '--load-prefix', T + '/chat.prefix')
out = c.say(b'one and two and one and two and one and two and three\r')
m = re.search(rb'prefix: (\d+) of (\d+) tokens taken', out)
check('the first message takes what it shares', m and 0 < int(m.group(1)) < int(m.group(2)), out)
answer = lambda x: re.sub(rb'(?s)prefix: .*?chat.prefix\r\n', b'', x.split(b'\x1b[?2004l', 1)[-1])
check('and is answered as without', answer(out) == answer(first), out + first)
check('the second message does not', c.say(b'four\r') == second)
c.say(b'/clear\r'); out = c.say(b'one and two and one and two and one and two and three\r')
check('a new conversation does again', b'taken from' in out and answer(out) == answer(first), out)
ended_well('with a prefix', c.end(b'\x04'), 0)
open(T + '/chat.prefix', 'ab').write(b'x')
c = Chat('--load-prefix', T + '/chat.prefix')
check('a bad prefix is said before the conversation', b'rc=3' in c.start and b'damaged' in c.start, c.start)
c = Chat('--save-prefix', T + '/none/x')
check('so is a place that cannot be written', b'rc=1' in c.start and b'cannot write' in c.start, c.start)

c = Chat('-n', '3', '--temp', '0', '-v')
c.say(b'one\r')
out = c.say(b'two\r').split(b'prompt, ', 1)[-1].replace(b'\r', b'')
text = out.split(b'\n', 1)[1]
if b'<|eot_id|>' in text: check('the answer is closed before the next turn', text.startswith(b'<|eot_id|>'), out)
c.end(b'\x04')

# a full context
c = Chat('-n', '5', '-c', '96')
out = b''.join(c.say(b'a message of some words\r') for i in range(6))
check('a full context refuses', b'the conversation is full: /clear begins a new one, --overflow drop forgets the oldest turns' in unbroken(out), out)
out = c.say(b'/clear\r'); check('/clear says what it did', b'the conversation is empty now' in out, out)
out = c.say(b'a message\r'); check('and it goes on', b'full' not in out and b'empty' not in out, out)
ended_well('a full context', c.end(b'\x04'), 0)
c = Chat('-n', '5', '-c', '96', '--overflow', 'drop')
out = b''.join(c.say(b'a message of some words\r') for i in range(12))
check('or drops', b'of the oldest turns' in unbroken(out) and b'> context' not in out, out)
c.say(b'/clear\r'); c.say(b'one message of several words\r'); c.say(b'/save %s/s2\r' % T.encode())
loaded = int(re.search(rb'loaded (\d+) tokens', c.say(b'/load %s/s2\r' % T.encode())).group(1))
out = b''.join(c.say(b'a message of some words\r') for i in range(4))
gone = re.search(rb'forgot \d+ of the oldest turns, (\d+) tokens', unbroken(out))
check('what was loaded is dropped as one turn', gone and int(gone.group(1)) >= loaded - 2, out)
out = c.say(b'many words ' * 100 + b'\r')
check('one message that is too long', b'> context 96' in out, out)
check('and it goes on', b'> context' not in c.say(b'short\r'))
ended_well('dropping', c.end(b'\x04'), 0)

c = Chat('-n', '5', '-c', '192', '--temp', '0', '--overflow', 'drop', env={'HOME': T})
for i in range(9): c.say(b'message %d of some words\r' % i)
c.say(b'/text ~/dropped\r'); said = re.findall(r'You: message (\d) of some words\n\nModel: ', open(T + '/dropped').read())
check('the newest turns are left as they were', 1 < len(said) < 9 and said == [str(i) for i in range(9 - len(said), 9)], repr(said).encode())
c.say(b'/undo\r'); c.say(b'/text ~/dropped\r'); said = re.findall(r'You: message (\d)', open(T + '/dropped').read())
check('/undo knows where they begin', said and said[-1] == '7', repr(said).encode()); c.end(b'\x04')

# Ctrl-C stops the answer
stopped = False
for seed in range(6):
    c = Chat('-t', '1', '--temp', '1', '-s', str(seed), env={'MEDRUN_KERNELS': 'scalar'})
    os.write(c.fd, b'hello\r'); c.read(lambda x: x.count(b'\n') > 0); os.write(c.fd, b'\x03')
    out = c.drawn()
    stopped = b'(stopped' in out
    if stopped: break
    c.end(b'\x04')
if stopped:
    check('the conversation goes on', b'\x1b[?2004h' in c.say(b'/stats\r'))
    ended_well('after it', c.end(b'\x04'), 0)
else: skipped += 1; print('skipped: Ctrl-C in an answer: all were over first')

# nor is it lost where it is typed with Enter, while the terminal is raw still; where nothing is answered it stops nothing
c = Chat('-n', '40', '--temp', '0', '-q')
os.write(c.fd, b'hello\r\x03'); out = c.drawn()
check('Ctrl-C right behind Enter', b'(stopped; your message is forgotten)' in unbroken(out), out)
out = c.say(b'/stats\r\x03'); out = c.say(b'hello\r')
check('Ctrl-C behind a command stops no later answer', b'(stopped' not in out and b'leaves' not in out, out)
out = c.say(b'/stats\rignored\x03/set temp 0\r')
check('it takes back what was typed before it, and nothing behind it', b'temp is 0 now' in out and b'ignored' not in out, out)
ended_well('typed ahead', c.end(b'\x04'), 0)
# where nothing is drawn, the terminal completes nothing
pid, fd = pty.fork()
if pid == 0: os.execvpe(medrun, [medrun, model, '-q'], dict(os.environ, TERM='dumb'))
os.write(fd, b'/help\n/bye\n')
out = all_shown(pid, fd)
check('/help on a dumb terminal', b'/system [TEXT]' in out and b'Ctrl-C' in out and b'Tab' not in out, out)

# a signal leaves no half of a file
def bytes_of(path):                 # 0 also where it goes just now
    try: return os.path.getsize(path)
    except OSError: return 0
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    p = subprocess.Popen([medrun, 'logits', demo, '--ids', '5 ' * 250, '--all', '-b', '1', '-t', '1', '-o', T + '/ended.f32'], stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ, MEDRUN_KERNELS='scalar'),
                         preexec_fn=lambda: [signal.signal(s, signal.SIG_DFL) for s in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM)])
    while p.poll() is None and not bytes_of(T + '/ended.f32.partial'): time.sleep(0.002)
    p.send_signal(number); p.wait()
    if p.returncode == 0: skipped += 1; print('skipped: signal %d: the logits were there first' % number); continue
    check('signal %d ends logits' % number, p.returncode == -number, b'%d' % p.returncode)
    check('signal %d: no file, whole or half' % number, not os.path.exists(T + '/ended.f32.partial') and not os.path.exists(T + '/ended.f32'))

# nor does it wait for the end of a long message; /stats counts what was read of it
open(T + '/long', 'w').write('The patient has fever and a cough. ' * 100)
c = Chat('-t', '1', '-b', '8', env={'MEDRUN_KERNELS': 'scalar'}, model=demo)
os.write(c.fd, b'/read %s/long\r' % T.encode()); c.read(lambda x: x.count(b'\n') > 0); time.sleep(0.2); os.write(c.fd, b'\x03')
if b'your message is forgotten' in unbroken(c.drawn()):
    out = c.say(b'/stats\r'); check('what was read of a message', figures(out)[0] < 800 and figures(out)[2] == 0, out)
else: skipped += 1; print('skipped: Ctrl-C in a long message: it was over first')
c.end(b'\x15\x04')

# Ctrl-C during a long prompt does not wait for the end of the pass
open(T + '/long', 'w').write('The patient has fever and a cough. ' * 25)
line = [medrun, 'run', demo, '-f', T + '/long', '-n', '1', '-q', '-b', '2048', '-t', '1']
def long_prompt(wait):
    start = time.time()
    p = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=dict(os.environ, MEDRUN_KERNELS='scalar'))
    if wait: time.sleep(wait); p.send_signal(signal.SIGINT)
    err = p.communicate()[1]
    return p.returncode, time.time() - start, err
rc, whole, err = long_prompt(0)
check('a long prompt', rc == 0, err)
rc, part, err = long_prompt(0.3 * whole)
check('Ctrl-C in a pass of %.1f s: ended after %.1f s' % (whole, part), rc == 130 and part < 0.3 * whole + max(1, 0.45 * whole), err)

# and run; a second one would end it at once
p_env = dict(os.environ, MEDRUN_KERNELS='scalar')
for seed in range(10):
    p = subprocess.Popen([lab, 'record', model, T + '/stopped.json', '-p', 'hello', '-t', '1', '-s', str(seed),
                          '--temp', '1', '-q'], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         stdin=subprocess.DEVNULL, env=p_env)
    os.read(p.stdout.fileno(), 1)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate()
    if p.returncode not in (0, 5): break
if p.returncode in (0, 5): skipped += 1; print('skipped: Ctrl-C: all answers were over first')
else:
    check('Ctrl-C: exit %d' % p.returncode, p.returncode == 130 and err == b'', err)
    rc = subprocess.run([lab, 'replay', T + '/stopped.json'], capture_output=True, env=p_env)
    check('what was stopped can be replayed', rc.returncode == 0, rc.stdout + rc.stderr)

# checkpoints with another header: proofs that differ, texts that drive terminals
data = open(model, 'rb').read()
n = struct.unpack('<Q', data[8:16])[0]
def variant(change, path):
    header = json.loads(data[16:16 + n])
    change(header)
    text, first = json.dumps(header, separators=(',', ':')).encode().ljust(n), header['tensors'][0]['offset']
    if 16 + len(text) + 32 > first: return False
    head = data[:8] + struct.pack('<Q', len(text)) + text
    open(path, 'wb').write((head + hashlib.sha256(head).digest()).ljust(first, b'\0') + data[first:])
    return True
def run(*args, **kw):
    p = subprocess.run([medrun, *args], capture_output=True, stdin=subprocess.DEVNULL, **kw)
    return p.returncode, p.stdout, p.stderr
def change_ids(kind):
    def change(h): ids = h['proofs'][kind][0]['ids']; ids[-1] = ids[-1] + 1 if ids[-1] < 200 else 5
    return change
for kind in ('tokens', 'chats', 'logits'):
    if not json.loads(data[16:16 + n]).get('proofs', {}).get(kind): skipped += 1; print('skipped: no proofs of', kind); continue
    if not variant(change_ids(kind), T + '/v.mdr'): skipped += 1; print('skipped: no room in the header'); continue
    rc, out, err = run('verify', T + '/v.mdr')
    check('a proof of %s that differs' % kind, rc == 4 and b'%s proof 1 DIFFERS: expected ' % kind.ljust(10).encode() in out
          or rc == 4 and re.search(kind.encode() + rb' *proof 1 DIFFERS: expected ', out), out + err)
def hostile(h): h['provenance'] = {'sources': [], 'licence': '\x1b[2J\x07', 'notice': 'a\u202eb\x9b'}
if variant(hostile, T + '/v.mdr'):
    rc, out, err = run('show', T + '/v.mdr')
    check('control characters do not reach the terminal', rc == 0 and not re.search(rb'[\x00-\x09\x0b-\x1f\x7f]|\xe2\x80\xae|\xc2\x9b', out), out)
def hostile_name(h): h['name'] = 'A\x1b[31m\x9b\u202e'; h['tensors'][0]
if variant(hostile_name, T + '/v.mdr'):
    for program, args in ((medrun, ['run', T + '/v.mdr', '-p', 'x', '-n', '1']), (medrun, ['show', T + '/v.mdr']),
                          (lab, ['bench', T + '/v.mdr', '-p', '4', '-n', '2', '-r', '1'])):
        p = subprocess.run([program, *args], capture_output=True, stdin=subprocess.DEVNULL)
        check('a hostile name drives no terminal: %s' % args, p.returncode == 0 and
              not re.search(rb'\x1b|\xe2\x80\xae|\xc2\x9b', p.stdout + p.stderr), p.stdout + p.stderr)
rec = T + '/stopped.json'
if os.path.exists(rec):
    r = json.loads(open(rec).read()); r['kernels'] = 'a\x1b[31m'; r['logits_sha256'] = '\x9b' + r['logits_sha256'][2:]
    open(rec, 'w').write(json.dumps(r)); p = subprocess.run([lab, 'replay', rec], capture_output=True)
    check('a hostile record drives no terminal', p.returncode == 4 and not re.search(rb'\x1b|\xc2\x9b', p.stdout + p.stderr),
          p.stdout + p.stderr)
# the table of tensors ends the header, and fills the parser's array of nodes: verify looks at no node behind it
def nodes(x):
    return 1 + (sum(1 + nodes(v) for v in x.values()) if isinstance(x, dict) else sum(map(nodes, x)) if isinstance(x, list) else 0)
def last_tensors(h):
    tensors = h.pop('tensors')
    h['provenance'].pop('sources', 0); h['proofs'] = dict(tokens=[], chats=[], logits=[])
    want = 64
    while want < nodes(h) + 1 + nodes(tensors) + 2: want *= 2
    h['provenance']['x'] = [0] * (want - nodes(h) - 1 - nodes(tensors) - 2)
    h['tensors'] = tensors
    assert nodes(h) == want
if variant(last_tensors, T + '/v.mdr'):
    rc, out, err = run('verify', T + '/v.mdr')
    check('verify with the tensors last', rc == 0, out + err)
else: skipped += 1; print('skipped: no room for many nodes')
def no_proofs(h): h['proofs'] = {}
variant(no_proofs, T + '/v.mdr'); rc, out, err = run('verify', T + '/v.mdr')
check('proofs that are missing', rc == 3, out + err)
def bad_proofs(h): h['proofs'] = {'tokens': [7], 'chats': [{}], 'logits': ['']}
variant(bad_proofs, T + '/v.mdr'); rc, out, err = run('verify', T + '/v.mdr')
check('proofs of another type', rc == 3, out + err)
says = lambda role, text: {'messages': [{'role': role, 'content': text}]}
damaged = [('chats', dict(says('doctor', 'x'), ids=[1])), ('chats', dict(says('tool', 'x'), ids=[1])),
           ('chats', dict(says('user', 'x'), ids=[-1])), ('chats', dict(says('user', 7), ids=[1])),
           ('chats', {'messages': [], 'ids': [1]}), ('chats', {'messages': 'x', 'ids': [1]}),
           ('chats', dict(says('user', 'x'), date='2025-02-30', ids=[1])), ('tokens', {'text': 'x'}),
           ('chats', dict(says('user', 'x'), date=7, ids=[1])), ('tokens', {'text': 'x', 'ids': [1e9]}),
           ('tokens', {'text': 'x', 'ids': 'x'}), ('tokens', {'text': 'x', 'ids': [1.5]}),
           ('logits', {'ids': [1 << 30], 'sha256': '0' * 64}), ('logits', {'ids': [1]}),
           ('logits', {'ids': [], 'sha256': '0' * 64}), ('logits', {'ids': [1], 'sha256': 7})]
for i, (kind, proof) in enumerate(damaged):
    def one(h): h['proofs'][kind] = [proof]
    variant(one, T + '/v.mdr'); rc, out, err = run('verify', T + '/v.mdr')
    good = rc == 3 or (rc == 4 and proof.get('messages', [{}])[:1] == [{'role': 'tool', 'content': 'x'}])
    check('damaged proof %d' % i, good, out + err + b' %d' % rc)
# a template that the exporter did not know
def unknown(h): h['chat']['template'] = 'unknown'; h['proofs']['chats'] = []
variant(unknown, T + '/v.mdr')
for args in (['run', T + '/v.mdr', '-p', 'x'], [T + '/v.mdr', '-p', 'x']):
    rc, out, err = run(*args)
    check('an unknown template is refused', rc == 2 and b'--template' in err and err.count(b'\n') == 1, out + err)
for args in (['run', '--raw', '-p', 'x', '-n', '2'], ['run', '--template', 'llama3', '-p', 'x', '-n', '2'], ['show'], ['verify'], ['tokenize', '-p', 'x']):
    rc, out, err = run(args[0], T + '/v.mdr', *args[1:])
    check('an unknown template does not matter to %s' % args, rc == 0, out + err)
# what another implementation computed stands in a proof: its distance is said and decides nothing
ids = json.loads(data[16:16 + n])['proofs']['logits'][0]['ids']
run('logits', model, '--ids', ' '.join(map(str, ids)), '--strict', '-o', T + '/r.f32')
floats = open(T + '/r.f32', 'rb').read()
row = struct.unpack('<%df' % (len(floats) // 4), floats)
top = max(range(len(row)), key=row.__getitem__)
other = (top + 1) % len(row)
def reference(**change):
    def add(h):
        h['proofs']['tokens'], logits = h['proofs']['tokens'][:1], h['proofs']['logits'][0]
        logits['reference'] = dict(dict(source='another', ids=[top, other], values=[row[top], row[other]]), **change)
    if not variant(add, T + '/v.mdr'): sys.exit('no room in the header')
    check('verify takes no notice', run('verify', T + '/v.mdr')[0] == 0)
    p = subprocess.run([lab, 'compare', T + '/v.mdr'], capture_output=True, stdin=subprocess.DEVNULL)
    return p.returncode, p.stdout, p.stderr
line = lambda distance, largest: re.compile(rb'^proof 1: relative L2 ' + distance + rb' to another; the largest is ' + largest + rb'$', re.M)
rc, out, err = reference()
check('a reference that agrees', rc == 0 and line(rb'0\.0e\+00', b'the same').search(out), out + err)
rc, out, err = reference(values=[1.25 * row[top], 1.25 * row[other]])
check('a reference that is a quarter larger', rc == 0 and line(rb'2\.0e-01', b'the same').search(out), out + err)
rc, out, err = reference(values=[-1e30, 1e30])
check('a reference with another largest', rc == 0 and line(rb'1\.0e\+00', b'another').search(out), out + err)
rc, out, err = reference(source='\x1b[2J\u202e')
check('a hostile source', rc == 0 and b'?[2J?; ' in out, out + err)
for change in (dict(ids=[0]), dict(ids=[0, 1 << 31]), dict(values=[1, '2']), dict(values=[1, 1e39]), dict(values={'a': 1}), dict(ids=[], values=[]), dict(source=7)):
    rc, out, err = reference(**change)
    check('a reference with %s' % change, rc == 3 and err.count(b'\n') == 1, out + err)
print('%d passed, %d failed, %d skipped' % (passed, failed, skipped))
PY
    python3 "$T/terminal.py" "$medrun" "$model" "$T" "$lab" >"$T/python" 2>&1
    grep -v '^[0-9]* passed, ' "$T/python"
    last=$(tail -n 1 "$T/python")
    case $last in
        [0-9]*' passed, '*)
            set -- $last; passed=$((passed + $1)) failed=$((failed + $3)) skipped=$((skipped + $5));;
        *) bad 'the Python part did not end';;
    esac
else skip 'the terminal: no python3'; fi

finish
