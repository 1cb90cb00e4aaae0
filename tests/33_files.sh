#!/bin/sh
# 33_files.sh BIN BUILD - disks that are full or read-only, and a checkpoint that is cut while it is
# in use: one line, exit 1, and nothing that is half written.
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
    check "a checkpoint that is cut: exit $rc, wanted 1" [ $rc = 1 ]
    check "one line: $(cat "$T/err")" [ "$(grep -c 'cannot be read any more' "$T/err")" = "$(wc -l <"$T/err")" ]
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
        "medrun-export --help" "medrun-export --version" "medrun-eval --help" "medrun-eval --version"; do
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
"$bin/medrun-export" --tokenizer-only "$T/hub" "$T/t.bin" 2>"$T/err"
check "only the hub's cache: exit $?" [ $? = 3 ]
mkdir -p "$T/onnx/onnx"; cp "$fixtures"/llama-tied/*.json "$T/onnx"; : >"$T/onnx/onnx/model.onnx"
cached 'found onnx/model.onnx, ONNX' "$T/onnx"

finish
