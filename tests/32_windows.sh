#!/bin/sh
# 32_windows.sh BIN BUILD - the programs for Windows, built by mingw-w64 and run by wine: they need no
# library beside them and say and write what those of this machine do.
. tests/script.sh
only_in_test_all "programs for Windows"
for tool in x86_64-w64-mingw32-gcc x86_64-w64-mingw32-objdump wine; do
    command -v $tool >/dev/null || { skip "Windows: no $tool"; finish; }
done
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
case $1 in /*) bin=$1;; *) bin=$PWD/$1;; esac
case $2 in /*) build=$2;; *) build=$PWD/$2;; esac
demo=$PWD/tools/demo/demo.mdr fixture=$PWD/tests/fixtures/llama-tied
win=$build/windows
unset MAKEFLAGS MFLAGS MAKEOVERRIDES DISPLAY TERM
WINEPREFIX=$build/wine WINEDEBUG=-all WINEDLLOVERRIDES='mscoree,mshtml=' MEDRUN_TEST_BUILD=$build
export WINEPREFIX WINEDEBUG WINEDLLOVERRIDES MEDRUN_TEST_BUILD

# code N PROGRAM ARGUMENTS: runs the program for Windows; out and err in $T
code() {
    want=$1 program=$2; shift 2
    timeout 120 wine "$win/$program.exe" "$@" <"${in:-/dev/null}" >"$T/out" 2>"$T/err"; rc=$?
    check "$program $*: exit $rc, wanted $want: $(cat "$T/err")" [ $rc = "$want" ]
}
err_is() { check "stderr is '$1': $(cat "$T/err")" [ "$1" = "$(cat "$T/err")" ]; }
same() { check "$1 and $2 are the same" cmp -s "$1" "$2"; }

env -u CC -u CFLAGS make -s BUILD="$build" windows >"$T/log" 2>&1; rc=$?
check "it builds: $(tail -n 5 "$T/log")" [ $rc = 0 ]
check "without a warning: $(grep warning "$T/log" | head -n 3)" [ ! -s "$T/log" ]
[ $rc = 0 ] || finish
for program in medrun medrun-export medrun-eval medrun-lab medrun-explain; do
    x86_64-w64-mingw32-objdump -p "$win/$program.exe" >"$T/log"
    alien=$(sed -n 's/.*DLL Name: //p' "$T/log" | grep -Eiv '^(advapi32|kernel32|msvcrt|shell32)\.dll$')
    check "$program has only the system's libraries: $alien" [ -z "$alien" ]
    # the stack has no place that is aligned to more than 16 bytes
    x86_64-w64-mingw32-objdump -d --no-show-raw-insn "$win/$program.exe" >"$T/log"
    check "$program wants no vector aligned" [ -z "$(grep -E 'vmov(ap|dqa|nt).*%[yz]mm' "$T/log" | grep '(%')" ]
done

if ! timeout 300 wine "$win/medrun.exe" --version >"$T/out" 2>&1; then
    skip "Windows: wine does not run here: $(tail -n 1 "$T/out")"; finish
fi
P="$T/a Ω b"; mkdir "$P"; cp "$demo" "$P/my Ωdel.mdr"; chmod 444 "$P/my Ωdel.mdr"
model="$P/my Ωdel.mdr"

# ---- what it says ----
q='What are the symptoms of diabetes?'
"$bin/medrun" run "$demo" -q -p "$q" >"$T/wanted"; code 0 medrun run "$model" -q -p "$q"; same "$T/out" "$T/wanted"
code 0 medrun verify "$model"
code 0 medrun-lab doctor; check 'all kernels agree' [ -z "$(grep DIFFERS "$T/out")" ]
printf 'Ω \360\237\230\200\r\nb\377\n' >"$T/text"; in=$T/text
"$bin/medrun" tokenize "$demo" <"$T/text" >"$T/ids"; code 0 medrun tokenize "$model"; same "$T/out" "$T/ids"
in=$T/ids; code 0 medrun detokenize "$model" -; same "$T/out" "$T/text"; in=
"$bin/medrun" tokenize "$demo" -p 'Ω *.c "x\"' >"$T/ids"
code 0 medrun tokenize "$model" -p 'Ω *.c "x\"'; same "$T/out" "$T/ids"
MEDRUN_PROMPT='Ω *.c "x\"'; export MEDRUN_PROMPT
code 0 medrun tokenize "$model"; same "$T/out" "$T/ids"; unset MEDRUN_PROMPT

# ---- what it writes ----
"$bin/medrun" logits "$demo" --ids '1 2 3 4 5 6 7 8 9' --all --strict -o "$T/wanted.f32"
for k in scalar $(timeout 60 wine "$win/medrun-lab.exe" doctor | sed -n 's/^kernels *//p'); do
    MEDRUN_KERNELS=$k; export MEDRUN_KERNELS
    code 0 medrun logits "$model" --ids '1 2 3 4 5 6 7 8 9' --all --strict -o "$P/Ω.f32"; same "$P/Ω.f32" "$T/wanted.f32"
done
unset MEDRUN_KERNELS
for type in int8 int4; do
    "$bin/medrun-export" "$fixture" "$T/wanted.mdr" --name x --type $type 2>/dev/null
    code 0 medrun-export "$fixture" "$P/xΩ.mdr" --name x --type $type; same "$P/xΩ.mdr" "$T/wanted.mdr"
done
code 0 medrun run "$model" -p hello -q --temp 0 -n 5 --save-prefix "$P/pΩ"; cp "$T/out" "$T/wanted"
code 0 medrun-lab record "$model" "$P/rΩ" -p hello -q --temp 0 -n 5; same "$T/out" "$T/wanted"
code 0 medrun run "$model" -p hello -q --temp 0 -n 5 --load-prefix "$P/pΩ"; same "$T/out" "$T/wanted"
code 0 medrun run "$model" -p hello -q --temp 0 -n 5 --save-prefix "$P/pΩ"
code 0 medrun-lab replay "$P/rΩ"
check 'others may not read them' [ -z "$(find "$P" -name '[pr]Ω' -perm /007)" ]
check 'nothing else is left' [ -z "$(find "$P" -name '*.partial')" ]
m="medqa tests/eval/medqa.jsonl --limit 4 -q"
"$bin/medrun-eval" "$demo" $m -o "$T/eval" >/dev/null 2>&1
code 0 medrun-eval "$model" $m -o "$P/eΩ.jsonl"; same "$P/eΩ.jsonl" "$T/eval"
head -n 3 "$T/eval" >"$P/eΩ.jsonl"
code 0 medrun-eval "$model" $m -o "$P/eΩ.jsonl" --resume; same "$P/eΩ.jsonl" "$T/eval"
long=$P/$(printf '%0100d' 1)/$(printf '%0100d' 2)/$(printf '%0100d' 3); mkdir -p "$long"
code 0 medrun-export --tokenizer-only "$fixture" "$long/t.bin"; code 0 medrun tokenize "$long/t.bin" -p x

# ---- what it refuses ----
code 3 medrun show "$P/no Ω.mdr"; err_is "medrun: $P/no Ω.mdr: cannot open: No such file or directory"
code 3 medrun show "$P"
err_is "medrun: $P is a folder and no checkpoint yet; this makes one: medrun-export \"$P\" \"${P##*/}-int8.mdr\" --type int8"
mkfifo "$T/pipe"
code 3 medrun show "$T/pipe"; err_is "medrun: $T/pipe: is not a regular file but a pipe or a device, so it cannot be mapped"
code 1 medrun logits "$model" --ids 1 -o "$P/no/x"; err_is "medrun: $P/no/x: cannot write: No such file or directory"
code 1 medrun logits "$model" --ids 1 -o "$P"; check "a folder in the way: $(cat "$T/err")" [ ! -e "$P.partial" ]

# ---- the tests of what differs most: vectors on the stack, sessions in files ----
for unit in 06_kernels 15_session; do
    x86_64-w64-mingw32-gcc -w -O2 -static -o "$T/$unit.exe" "tests/$unit.c" -lm -lpthread
    timeout 300 wine "$T/$unit.exe" >"$T/out" 2>&1; rc=$?
    check "$unit: exit $rc: $(tail -n 5 "$T/out")" [ $rc = 0 ]
done
finish
