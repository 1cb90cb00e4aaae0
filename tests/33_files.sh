#!/bin/sh
# 33_files.sh BIN BUILD - disks that are full or read-only, and a checkpoint that is cut while it is
# in use: one line, exit 1 or 3, and nothing that is half written. What stands where a file is to be
# written: links, pipes, devices, files of others, files that are read.
. tests/script.sh
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
case $1 in /*) bin=$1;; *) bin=$PWD/$1;; esac
model=$PWD/$2/llama-tied-int8.mdr fixtures=$PWD/tests/fixtures

# Written by a shell that has a disk of 64 KB for itself: a line for each program that did not end
# with code 1, one line on stderr and its words in it, or that left something behind.
cat >"$T/disk.sh" <<'EOS'
bin=$1 model=$2 fixtures=$3 T=$4
echo '{"question":"What?","choices":["a","b"],"answer":0}' >"$T/asked.jsonl"
fails() {
    words=$1; shift
    "$@" >/dev/null 2>"$T/err"; rc=$?
    left=$(ls -A "$T/disk" | grep -v '^kept$')
    [ $rc = 1 ] && [ "$(wc -l <"$T/err")" = 1 ] && grep -q "$words" "$T/err" && [ -z "$left" ] ||
        echo "$*: exit $rc, left: $left; $(cat "$T/err")"
    echo one >>"$T/tried"
}
fail_all() {
    fails "$1" "$bin/medrun" logits "$model" --ids '1 2 3 4 5 6 7 8 9' --all -o "$T/disk/logits"
    fails "$1" "$bin/medrun-lab" record "$model" "$T/disk/record" -p hello -n 1 -q
    fails "$1" "$bin/medrun" run "$model" -p hello -n 1 -q --save-prefix "$T/disk/prefix"
    fails "$1" "$bin/medrun-eval" "$model" generic "$T/asked.jsonl" -q -o "$T/disk/v.jsonl" --html "$T/disk/h.html"
    fails "$1" "$bin/medrun-eval" "$model" generic "$T/asked.jsonl" -q --html "$T/disk/h.html"
    fails "$2" "$bin/medrun-export" "$fixtures/llama-tied" "$T/disk/out.mdr"
    fails "$2" "$bin/medrun-export" --tokenizer-only "$fixtures/llama-tied" "$T/disk/out.bin"
}
mount -t tmpfs -o size=64k none "$T/disk" || exit 2
cat /dev/zero >"$T/disk/kept" 2>/dev/null
fail_all 'No space left' 'make room'
rm "$T/disk/kept"
mount -o remount,ro "$T/disk"
fail_all 'Read-only' 'Read-only'
EOS
mkdir "$T/disk"
unshare -rm sh "$T/disk.sh" "$bin" "$model" "$fixtures" "$T" >"$T/out" 2>/dev/null; rc=$?
if [ -e "$T/tried" ]; then
    check "fourteen programs tried: $(wc -l <"$T/tried"), exit $rc" [ "$(wc -l <"$T/tried")" = 14 ]
    check "$(cat "$T/out")" [ ! -s "$T/out" ]
else skip 'full and read-only disks: this user cannot mount one'; fi

# The prompt comes from a pipe, so that the checkpoint is open and nothing of it was used.
cp "$model" "$T/cut.mdr"
if [ -d /proc/self ] && mkfifo "$T/pipe"; then
    "$bin/medrun" run "$T/cut.mdr" -f - -n 4 -q <"$T/pipe" >"$T/out" 2>"$T/err" &
    exec 3>"$T/pipe"
    i=0
    until grep -q cut.mdr /proc/$!/maps || [ $((i += 1)) = 100 ]; do sleep 0.1; done
    sleep 0.5
    dd if="$model" of="$T/cut.mdr" bs=4096 count=1 2>/dev/null
    echo hello >&3; exec 3>&-
    wait $!; rc=$?
    check "a checkpoint that is cut: exit $rc, wanted 3" [ $rc = 3 ]
    check "one line: $(cat "$T/err")" [ "$(grep -c 'cannot be read any more' "$T/err")$(wc -l <"$T/err")" = 11 ]
else skip 'a checkpoint that is cut: no /proc, or no pipes'; fi

# The tools: medrun-eval in the middle of its questions, medrun-export in the middle of its text.
cut() { # FILE WHAT WORD: waits for PID to be so far that WHAT has this word, then cuts FILE
    i=0
    until grep -q "$3" "$2" 2>/dev/null || ! kill -0 "$pid" || [ $((i += 1)) = 600 ]; do sleep 0.05; done
    dd if="$model" of="$1" bs=4096 count=1 2>/dev/null
    wait "$pid"; rc=$?
    check "$1 is cut: exit $rc, wanted 3" [ $rc = 3 ]
    check "one line more: $(cat "$T/err")" [ "$(grep -c 'cannot be read any more' "$T/err")" = 1 ]
}
i=0
while [ $((i += 1)) -le 400 ]; do echo "{\"question\":\"What is $i?\",\"choices\":[\"a\",\"b\"],\"answer\":0}"
done >"$T/many.jsonl"
cp "$model" "$T/cut.mdr"
"$bin/medrun-eval" "$T/cut.mdr" generic "$T/many.jsonl" -t 2 --mode generate -n 8 -o "$T/cut.jsonl" -q >"$T/out" 2>"$T/err" & pid=$!
cut "$T/cut.mdr" "$T/cut.jsonl" truth
i=0
while [ $((i += 1)) -le 12000 ]; do echo "Question $i is about one thing of many, and the answer too."; done >"$T/text.txt"
"$bin/medrun-export" "$fixtures/llama-plain" "$T/fit.mdr" --type int4 --calibrate "$T/text.txt" >"$T/out" 2>"$T/err" & pid=$!
cut "$T/fit.mdr.partial" "$T/err" calibrating
check 'nothing is left of the export' [ -z "$(find "$T" -name 'fit.mdr*')" ]

# The place where help goes is full.
if [ -e /dev/full ]; then
    for line in "medrun help" "medrun --help" "medrun --version" "medrun-lab help" "medrun-lab --version" \
        "medrun-export --help" "medrun-export --version" "medrun-eval --help" "medrun-eval --version" \
        "medrun-explain --help" "medrun-explain --version" "medrun-serve --help" "medrun-serve --version"; do
        # shellcheck disable=SC2086
        "$bin"/$line >/dev/full 2>"$T/err"; rc=$?
        check "$line >/dev/full: exit $rc, wanted 1" [ $rc = 1 ]
        check "$line: one line: $(cat "$T/err")" grep -q "stdout: cannot write" "$T/err"
    done
else skip 'no /dev/full'; fi

# A pipe that nobody writes stands where a file is wanted: refused at once, with a line and no hang.
pipe() { # CODE COMMAND...
    want=$1; shift
    timeout 20 "$@" >/dev/null 2>"$T/err" </dev/null; rc=$?
    check "$*: exit $rc, wanted $want: $(cat "$T/err")" [ $rc = "$want" ]
    check "$*: says so: $(cat "$T/err")" grep -q "not a regular file" "$T/err"
}
mkdir "$T/folder"; cp "$fixtures"/llama-tied/* "$T/folder"; rm "$T/folder/config.json"
if mkfifo "$T/silent" "$T/folder/config.json"; then
    pipe 3 "$bin/medrun" show "$T/silent"
    # A text may come out of a pipe, but not of one that nobody writes.
    timeout 20 "$bin/medrun" run "$model" -q -n 1 -f "$T/silent" >/dev/null 2>"$T/err"; rc=$?
    check "-f of a silent pipe: exit $rc, wanted 2" [ $rc = 2 ]
    timeout 20 "$bin/medrun" render --template llama3 --messages "$T/silent" 2>"$T/err"; rc=$?
    check "--messages of a silent pipe: exit $rc, wanted 3" [ $rc = 3 ]
    (sleep 1; { sleep 1; echo hello; } >"$T/silent") &
    timeout 20 "$bin/medrun" run "$model" -q -n 1 -f "$T/silent" >/dev/null 2>"$T/err"; rc=$?
    check "-f of a pipe that is written slowly: exit $rc: $(cat "$T/err")" [ $rc = 0 ]
    wait $!
    pipe 3 "$bin/medrun" tokenize "$T/silent" -p x
    pipe 3 "$bin/medrun" run "$model" -q -p x -n 1 --load-prefix "$T/silent"
    pipe 1 "$bin/medrun" run "$model" -q -p x -n 1 --save-prefix "$T/silent"
    pipe 1 "$bin/medrun" logits "$model" --ids 1 -o "$T/silent"
    pipe 3 "$bin/medrun-export" "$T/folder" "$T/out.mdr"
    pipe 3 "$bin/medrun-eval" "$model" medqa "$T/silent" -q
    check 'nothing is left beside the pipe' [ -z "$(find "$T" -name '*.partial')" ]
else skip 'a pipe where a file is wanted: no pipes'; fi

# A folder of the hub's cache: links to blobs, the snapshot that refs/main names.
hub=$T/hub/models--org--Tiny-Model shot=$T/hub/models--org--Tiny-Model/snapshots
mkdir -p "$hub/blobs" "$hub/refs" "$shot/0123abc" "$shot/4567def"
for f in "$fixtures"/llama-tied/*; do
    cp "$f" "$hub/blobs/${f##*/}.blob"
    ln -s "../../blobs/${f##*/}.blob" "$shot/0123abc/${f##*/}"
done
printf 0123abc >"$hub/refs/main"
cached() { # WORDS FOLDER: they stand in what a dry run says
    "$bin/medrun-export" --dry-run "$2" >"$T/out" 2>&1
    check "$2: wanted $1: $(cat "$T/out")" grep -q -- "$1" "$T/out"
}
cached 'name         Tiny-Model' "$hub"
cached 'snapshot 0123abc is used' "$hub"
cached 'name         Tiny-Model' "$shot/0123abc"
rm "$hub/refs/main"
cached 'found 2 snapshots' "$hub"
rmdir "$shot/4567def"
cached 'name         Tiny-Model' "$hub"
cached "hub's cache, wanted one model of it" "$T/hub"
rm -r "$shot/0123abc"
cached 'downloaded to its end' "$hub"
"$bin/medrun-export" -q "$fixtures/llama-tied" "$T/quiet.mdr" >"$T/err" 2>&1
check "-q: exit $?, $(cat "$T/err")" [ $? = 0 -a ! -s "$T/err" -a -s "$T/quiet.mdr" ]
"$bin/medrun" run "$hub" -p hi 2>"$T/err"; rc=$?
check "run of a folder: exit $rc: $(cat "$T/err")" [ $rc = 3 ]
check 'it says how to make a checkpoint' grep -q "medrun-export $hub models--org--Tiny-Model-int8.mdr" "$T/err"
"$bin/medrun-export" --tokenizer-only "$T/hub" "$T/t.bin" 2>"$T/err"
check "only the hub's cache: exit $?" [ $? = 3 ]
mkdir -p "$T/onnx/onnx"; cp "$fixtures"/llama-tied/*.json "$T/onnx"; : >"$T/onnx/onnx/model.onnx"
cached 'found onnx/model.onnx, ONNX' "$T/onnx"

# ---- what is written: beside its place, over nothing that is not medrun's, through no link ----
O=$T/outputs; mkdir "$O"; export O
new() { rm -rf "$O"; mkdir "$O"; for f; do printf 'a letter' >"$O/$f"; done; }
tries() { # CODE WORDS COMMAND...: one line with these words
    want=$1 words=$2; shift 2
    timeout 60 "$@" >"$T/out" 2>"$T/err" </dev/null; rc=$?
    check "$*: exit $rc, wanted $want: $(cat "$T/err")" [ $rc = "$want" ]
    [ -z "$words" ] || check "$*: says '$words': $(cat "$T/err")" grep -q -- "$words" "$T/err"
}
kept() { check "$1: the letter is there still" [ "$(cat "$O/$1")" = 'a letter' ]; }
echo '{"question":"What?","choices":["a","b"],"answer":0}' >"$T/one.jsonl"
# how KIND PATH: the command that writes one kind of output to PATH
how() {
    kind=$1 to=$2; shift 2
    case $kind in
    logits) set -- "$bin/medrun" logits "$model" --ids '1 2' -o "$to" "$@" ;;
    prefix) set -- "$bin/medrun" run "$model" -p hello -n 1 -q --save-prefix "$to" "$@" ;;
    record) set -- "$bin/medrun-lab" record "$model" "$to" -p hello -n 1 -q "$@" ;;
    checkpoint) set -- "$bin/medrun-export" "$fixtures/llama-tied" "$to" "$@" ;;
    tokenizer) set -- "$bin/medrun-export" --tokenizer-only "$fixtures/llama-tied" "$to" "$@" ;;
    result) set -- "$bin/medrun-eval" "$model" generic "$T/one.jsonl" -q -o "$to" "$@" ;;
    page) set -- "$bin/medrun-eval" "$model" generic "$T/one.jsonl" -q --html "$to" "$@" ;;
    esac
    tries "$code" "$say" "$@"
}
mode() { ls -l "$1" | head -c 10; }
for kind in logits prefix record checkpoint tokenizer result page; do
    new letter
    code=2 say='exists and is not' how $kind "$O/letter"; kept letter
    ln -s letter "$O/link"; code=2 say='symbolic link' how $kind "$O/link"; kept letter
    check "$kind: the link is there" [ -h "$O/link" ]
    code=1 say='found a folder' how $kind "$O"
    code=1 say='No such file' how $kind "$T/none/x"
    case $kind in result) ;; *)
        new; ln -s "$T/victim" "$O/x.partial"
        code=1 say='is left from a run that was stopped' how $kind "$O/x"
        check "$kind: nothing behind the link" [ ! -e "$T/victim" ]
        new x.partial; chmod 666 "$O/x.partial"
        code=1 say='or let --force do it' how $kind "$O/x"; kept x.partial
        new; code=0 say='' how $kind "$O/x"
        code=0 say='' how $kind "$O/x"                  # over its own
        : >"$O/x.partial"; chmod 666 "$O/x.partial"
        code=0 say='' how $kind "$O/x" --force
    esac
    new letter; code=0 say='' how $kind "$O/letter" --force
    check "$kind: --force writes it" [ "$(cat "$O/letter" | tr -d '\0')" != 'a letter' ]
    code=0 say='' how $kind "$O/new"
    case $kind in prefix|record|result) check "$kind is private: $(mode "$O/new")" [ "$(mode "$O/new")" = '-rw-------' ] ;; esac
    check "$kind: nothing is left beside it" [ -z "$(find "$O" -name '*.partial')" ]
done

# Devices are written to where that makes sense, and replaced nowhere.
for kind in prefix checkpoint tokenizer result; do code=1 say='not a regular file' how $kind /dev/null; done
for kind in logits record page; do code=0 say='' how $kind /dev/null; done
check '/dev/null is a device' [ -c /dev/null ]
new; code=0 say='' how logits "$O/x"
code=0 say='' how logits /dev/stdout; check 'logits to stdout' cmp -s "$T/out" "$O/x"
code=0 say='' how logits -; check 'logits to -, which is stdout' cmp -s "$T/out" "$O/x"
code=0 say='' how page -; check 'a page to -' grep -q '<!-- medrun -->' "$T/out"
code=0 say='' how record -; check 'a record to -' grep -q '{"engine": "me' "$T/out"
for kind in prefix checkpoint tokenizer result; do code=2 say='stands for an open stream' how $kind -; done
check 'there is no file -' [ ! -e - ]
if [ -e /dev/full ]; then code=1 say='No space left' how logits /dev/full; check '/dev/full is a device' [ -c /dev/full ]; fi
if mkfifo "$O/fifo"; then
    timeout 60 cat "$O/fifo" >"$O/read" & reader=$!
    exec 3>"$O/fifo"                        # waits until the reader is there
    code=0 say='' how logits "$O/fifo"; exec 3>&-; wait $reader; check 'logits to a pipe' cmp -s "$O/read" "$O/x"
    for kind in logits prefix record checkpoint tokenizer result page; do code=1 say='not a regular file' how $kind "$O/fifo"; done
    check 'the pipe is a pipe' [ -p "$O/fifo" ]
fi

# What a command reads it does not write, --force or not.
new; cp "$model" "$O/model"; cp "$T/one.jsonl" "$O/data"; ln "$O/model" "$O/same"; echo hello >"$O/text"
"$bin/medrun" run "$model" -p hello -n 1 -q --save-prefix "$O/prefix" >/dev/null; cp "$O/prefix" "$T/prefix"
for force in '' --force; do
    # shellcheck disable=SC2086
    {
    tries 2 'read by the same' "$bin/medrun" logits "$O/model" --ids 1 -o "$O/model" $force
    tries 2 'read by the same' "$bin/medrun" logits -m "$O/model" --ids 1 -o "$O/same" $force
    tries 2 'read by the same' "$bin/medrun" run "$model" -p hello -n 1 -q --load-prefix "$O/prefix" --save-prefix "$O/../outputs/prefix" $force
    tries 2 'read by the same' "$bin/medrun" run "$model" -f "$O/text" -n 1 -q --save-prefix "$O/text" $force
    tries 2 'read by the same' "$bin/medrun-lab" record "$O/model" "$O/same" -p hello -n 1 -q $force
    tries 2 'read by the same' "$bin/medrun-eval" "$O/model" generic "$O/data" -q -o "$O/data" $force
    tries 2 'read by the same' "$bin/medrun-eval" "$O/model" generic "$O/data" -q --html "$O/same" $force
    }
done
echo '[{"role":"user","content":"hi"}]' >"$O/talk"; cp "$O/talk" "$T/talk"; ln "$model" "$O/other"
for force in '' --force; do
    for to in '-o' '-o /dev/null --json'; do
        # shellcheck disable=SC2086
        {
        tries 2 'read by the same' "$bin/medrun-explain" "$O/model" -p hi -n 1 -q $to "$O/model" $force
        tries 2 'read by the same' "$bin/medrun-explain" "$O/model" -p hi -n 1 -q $to "$O/same" $force
        tries 2 'read by the same' "$bin/medrun-explain" "$model" -f "$O/text" -n 1 -q $to "$O/text" $force
        tries 2 'read by the same' "$bin/medrun-explain" "$model" --chat "$O/talk" -n 1 -q $to "$O/talk" $force
        tries 2 'read by the same' "$bin/medrun-explain" "$model" --mcq "$O/data:1" -q $to "$O/data" $force
        tries 2 'read by the same' "$bin/medrun-explain" "$model" -p hi --answer "@$O/text" -q $to "$O/text" $force
        tries 2 'read by the same' "$bin/medrun-explain" "$model" -p hi -n 1 -q --compare "$O/other" $to "$O/other" $force
        }
    done
done
tries 2 'are one file' "$bin/medrun-explain" "$model" -p hi -n 1 -q -o "$O/x" --json "$O/x"
check 'the talk is as it was' cmp -s "$O/talk" "$T/talk"; check 'and the text' [ "$(cat "$O/text")" = hello ]
tries 2 'are one file' "$bin/medrun-eval" "$model" generic "$O/data" -q -o "$O/x" --html "$O/x"
check 'all of it is as it was' cmp -s "$O/model" "$model"; check 'the prefix, too' cmp -s "$O/prefix" "$T/prefix"
check 'and the data' cmp -s "$O/data" "$T/one.jsonl"
tries 0 '' "$bin/medrun-eval" "$model" generic "$O/data" -q -o "$O/one"; cp "$O/one" "$O/two"
tries 2 'read by the same' "$bin/medrun-eval" --merge "$O/one" -o "$O/one"; check 'the result stays' cmp -s "$O/one" "$O/two"
tries 0 '' "$bin/medrun-eval" --merge "$O/one" -o "$O/two"
printf "no line" >"$O/text"; tries 3 "not a result" "$bin/medrun-eval" "$model" generic "$O/data" -q -o "$O/text" --resume
check 'a text without a line end is not cut' [ "$(cat "$O/text")" = 'no line' ]
tries 0 '' "$bin/medrun-eval" "$model" generic "$O/data" -q -o "$O/one" --force; check 'begun anew' cmp -s "$O/one" "$O/two"

# A bad place is refused before the work, and a name that is taken goes to one of two.
long=$(i=0; while [ $((i += 1)) -le 300 ]; do printf 'word '; done)
for kind in record page; do
    new letter; code=2 say='exists and is not' how $kind "$O/letter"
    check "$kind: nothing was asked or answered" [ ! -s "$T/out" ]
done
new; i=0
while [ $((i += 1)) -le 4 ]; do
    "$bin/medrun" run "$model" -p "$long" -n 1 -q --save-prefix "$O/p" >/dev/null 2>"$T/err$i" & eval "p$i=$!"
done
won=0; for i in 1 2 3 4; do eval "wait \$p$i" && won=$((won + 1)); done
check "saves to one name: $won of 4" [ $won -ge 1 ]
check 'each other one says why' [ "$(cat "$T"/err? | grep -vc 'another program is writing')" = 0 ]
tries 0 'taken from' "$bin/medrun" run "$model" -p "$long" -n 1 --load-prefix "$O/p"

# A file of a folder that is there and cannot be read is not one that is not there.
cp -r tests/fixtures/llama-tied "$T/looped"
if ln -s chat_template.jinja "$T/looped/chat_template.jinja" 2>"$T/err"; then
    "$bin/medrun-export" "$T/looped" "$T/unread.mdr" >"$T/out" 2>"$T/err"; rc=$?
    check "a link to itself: exit $rc: $(cat "$T/err")" [ $rc = 3 ]
    check 'names it' grep -q 'chat_template.jinja: cannot open' "$T/err"
    check 'and leaves nothing' [ ! -e "$T/unread.mdr" ]
    rm -f "$T/looped/chat_template.jinja" "$T/looped/README.md"; ln -s README.md "$T/looped/README.md"
    tries 0 'the licence is not known: .*README.md: cannot open' "$bin/medrun-export" "$T/looped" "$T/unread.mdr"
fi

# More than is read of a file, by commands that have no model.
dd if=/dev/zero of="$T/long" bs=1048576 count=17 2>"$T/err"
tries 3 'the most that is read' "$bin/medrun-lab" replay "$T/long"
tries 3 'the most that is read' "$bin/medrun" render --template llama3 --messages "$T/long"
dd if=/dev/zero of="$T/hole" bs=1 count=1 seek=3298534883327 2>"$T/err" &&
    tries 3 'wanted at most 1073741824' "$bin/medrun-export" "$fixtures/llama-plain" "$T/fit.mdr" --type int4 --calibrate "$T/hole"
{ cat "$T/text.txt" "$T/text.txt" | head -c 1048575; printf '\303\251 \351'; } >"$T/late"
tries 3 'byte 1048578: found what is no UTF-8' "$bin/medrun-export" "$fixtures/llama-plain" "$T/fit.mdr" --type int4 --calibrate "$T/late"

finish
