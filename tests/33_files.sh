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
    check "ten programs tried: $(wc -l <"$T/tried"), exit $rc" [ "$(wc -l <"$T/tried")" = 10 ]
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

finish
