#!/bin/sh
# targets.sh [--quick] [--list] [TARGET...]: builds medrun for each target that this machine has a
# compiler and an emulator for, runs it there, and prints the table of tools/README.md. On each set of
# words it asks the demo model a question, verifies it, and compares the bits of three sorts of
# logits with those below. Without --quick the unit programs run there too (hours, emulated). The
# last line is as in the tests. CC, CFLAGS and UNITS may be set.
cd "$(dirname "$0")/.." || exit 1
CC=${CC:-cc} CFLAGS=${CFLAGS:--O2} work=build/targets
UNITS=${UNITS:-"03_basics 04_threads 05_numbers 06_kernels 07_tensor 09_file 10_tokenizer 11_chat
                12_model 14_sampler 15_allocation 15_embedding 15_session 16_answers 20_export 21_gguf
                22_eval 13_transformer"}
posix="04_threads 15_embedding 20_export 21_gguf 22_eval"      # use what only such systems have

# NAME|COMPILER, FLAGS|RUNNER. Programs of one compiler are shared.
targets="x86-64, gcc|gcc|
x86-64, clang|clang|
x86-64, musl, static|musl-gcc -static|
x86-64 without AVX2 (Nehalem)|gcc|qemu-x86_64 -cpu Nehalem
x86-64 without SSE3 (qemu64)|gcc|qemu-x86_64 -cpu qemu64,-sse3
x86-64 with AVX2 (Haswell)|gcc|qemu-x86_64 -cpu Haswell
i686|i686-linux-gnu-gcc -static|
i686 without AVX2 (qemu32)|i686-linux-gnu-gcc -static|qemu-i386 -cpu qemu32
i686 without SSE2 (pentium3)|i686-linux-gnu-gcc -static|qemu-i386 -cpu pentium3
arm64, Cortex-A53|aarch64-linux-gnu-gcc -static|qemu-aarch64 -cpu cortex-a53
arm64, Cortex-A76|aarch64-linux-gnu-gcc -static|qemu-aarch64 -cpu cortex-a76
arm64, max|aarch64-linux-gnu-gcc -static|qemu-aarch64 -cpu max
armhf, Cortex-A9|arm-linux-gnueabihf-gcc -static|qemu-arm -cpu cortex-a9
armhf without NEON|arm-linux-gnueabihf-gcc -static|qemu-arm -cpu cortex-a15,neon=off
riscv64|riscv64-linux-gnu-gcc -static|qemu-riscv64
s390x, big-endian|s390x-linux-gnu-gcc -static|qemu-s390x
Windows, x86-64|x86_64-w64-mingw32-gcc -static|wine
OpenCL|gcc -DMEDRUN_OPENCL|env MEDRUN_DEVICE=0"

# SHA-256 of what `medrun logits --all` writes for these ids: int8 of the demo model, int4 and bf16
# --strict of four small models, one of each architecture.
ids="1 65 77 256 3 12 99 101 118 32 105 110 200 7 8 9 10 11 45 46 47 48 2 0 255 254 130 131 132 133"
int8=57b02f1811d588d2c652ed4e2b3ca58dabe5d8aac4fc142f62e87837a5f9d0c9
int4=431015bb1343eaa166d7c426fdcfbb6f41800b2e64a5de9fe8c15a770892a350
bf16=a17f5519d4321006a382fc9ee5b30ff2db0f1caf8fa4964cef6abf99209654a3
small="llama-grouped mistral-window arcee-yarn apertus-grouped"

quick= only=
for argument; do
    case $argument in
    --quick) quick=1;;
    --list) echo "$targets" | cut -d'|' -f1; exit 0;;
    -*) echo "targets.sh [--quick] [--list] [TARGET...]" >&2; exit 2;;
    *) only="$only|$argument";;
    esac
done

passed=0 failed=0 skipped=0
table="| target | words | checks | int8 | int4 | bf16 \`--strict\` |
|---|---|---|---|---|---|"
check() { # WHAT COMMAND...
    what=$1; shift
    if "$@"; then here=$((here + 1)) passed=$((passed + 1))
    else failed=$((failed + 1)) bad=$((bad + 1)); { echo "FAILED: $name: $what"; tail -n 3 "$dir/err"; } >&2; fi
}
row() { table="$table
| $name | $1 | $2 | $3 | $4 | $5 |"; }
skip() { skipped=$((skipped + 1)); echo "skipped: $name: $1"; row "" "skipped: $1"; }
lab() { timeout 600 $runner "$lab" "$@" 2> "$dir/err"; }
medrun() { timeout 600 $runner "$program" "$@" 2> "$dir/err"; }
digest() { sha256sum < "$1" | cut -d' ' -f1; }
add() { # DIGESTS DIGEST: with the beginning of one more, if it is another
    start=$(echo "${2:-none}" | cut -c1-12)
    case " $1 " in *" $start "*) echo "$1";; *) echo "${1:+$1 }$start";; esac
}

logits() { # TYPE OPTIONS MODEL...: the digest of the models' logits, or nothing
    options=$1; shift
    : > "$dir/all"
    for model; do
        medrun logits "$model" --ids "$ids" --all $options --force -o "$dir/out" || return
        cat "$dir/out" >> "$dir/all"
    done
    digest "$dir/all"
}

# Is there an instruction of AVX outside the functions that only run where AVX is?
no_avx() {
    objdump -d --no-show-raw-insn "$program" | awk '
        /^[0-9a-f]+ <.*>:$/ { own = $2 ~ /_avx(2|512|vnni)[.>]/ }
        !own && $2 ~ /^v/ && !/ver[rw]/ { print; bad = 1 } END { exit bad }' > "$dir/err"
}

try_words() { # of one set: answer, proofs, bits
    MEDRUN_KERNELS=$words; export MEDRUN_KERNELS
    medrun run tools/demo/demo.mdr -p "What are the symptoms of diabetes?" > "$dir/answer"
    check "$words: answers" grep -q thirst "$dir/answer"
    check "$words: verify" medrun verify tools/demo/demo.mdr > /dev/null
    found8=$(logits "" tools/demo/demo.mdr)
    found4=$(logits "" $(for m in $small; do echo build/$m-int4.mdr; done))
    found16=$(logits --strict $(for m in $small; do echo build/$m-bf16.mdr; done))
    check "$words: int8 logits: $found8" [ "$found8" = "$int8" ]
    check "$words: int4 logits: $found4" [ "$found4" = "$int4" ]
    check "$words: bf16 --strict logits: $found16" [ "$found16" = "$bf16" ]
    unset MEDRUN_KERNELS
    all8=$(add "$all8" "$found8") all4=$(add "$all4" "$found4") all16=$(add "$all16" "$found16")
}

# A machine that medrun is not for: one line, exit code 3, nothing on stdout.
try_refusal() {
    medrun run tools/demo/demo.mdr -p hello > "$dir/out"
    check "exit code" [ $? = 3 ]
    check "one line" [ "$(wc -l < "$dir/err")" = 1 ]
    check "no answer" [ ! -s "$dir/out" ]
    row "none" "$here passed: it refuses at start, as it should"
}

# On 32 bits a file larger than they can address is refused with its size.
try_large() {
    dd if=/dev/null of="$dir/large" bs=1 seek=5368709120 2> "$dir/err"
    medrun show "$dir/large" > "$dir/out"
    check "a file of 5 GiB: exit code" [ $? = 3 ]
    check "a file of 5 GiB: its size" grep -q 'its 5368709120 bytes' "$dir/err"
    rm -f "$dir/large"
}

try_units() {
    for unit in $UNITS; do
        case "$compiler $posix " in *mingw*" $unit "*) continue;; esac
        [ "$dir/test_$unit" -nt "tests/$unit.c" ] && [ "$dir/test_$unit" -nt medrun.c ] ||
            $compiler $CFLAGS -Wall -Wextra -Wshadow -o "$dir/test_$unit" "tests/$unit.c" -lm \
                -lpthread || { check "builds $unit" false; continue; }
        timeout 3600 $runner "$dir/test_$unit" > "$dir/log" 2> "$dir/err"
        check "$unit: $(tail -n 1 "$dir/log")" [ $? = 0 ]
    done
}

build() {
    [ "$program" -nt medrun.c ] && return
    for source in tools/lab.c medrun.c; do
        out=$program
        [ $source = medrun.c ] || out=$lab
        $compiler $CFLAGS -Wall -Wextra -Wshadow -Wconversion -o "$out" $source -lm -lpthread \
            2> "$dir/err" && [ ! -s "$dir/err" ] || return
    done
}

try_target() { # NAME COMPILER RUNNER
    name=$1 compiler=$2 runner=$3 here=0 bad=0
    for tool in ${compiler%% *} ${runner%% *}; do
        command -v "$tool" > /dev/null || { skip "no $tool"; return; }
    done
    dir=$work/$(echo "$compiler" | tr -c 'a-zA-Z0-9\n' '-'); mkdir -p "$dir"
    exe=$(case $compiler in *mingw*) echo .exe;; esac)
    program=$dir/medrun$exe lab=$dir/medrun-lab$exe
    check "builds, quiet" build || return
    [ $bad = 0 ] || { row "" "does not build"; return; }
    case $name in s390x*|*"without SSE2"*) try_refusal; return;; esac
    case $name in "x86-64, "*) check "no AVX but in its words" no_avx;; esac
    case $name in i686*|armhf*) try_large;; esac
    [ -n "$quick" ] || try_units
    check "doctor" lab doctor > "$dir/doctor"
    grep -q '^OpenCL  *no device' "$dir/doctor" && { skip "no OpenCL device"; return; }
    sets=$(sed -n 's/^self-test  \([^,]*\), int8: as scalar.*/\1/p' "$dir/doctor")
    check "has words" [ -n "$sets" ]
    case $compiler in *OPENCL*) sets=scalar;; esac      # for what the device does not compute
    all8= all4= all16=
    for words in $sets; do try_words; done
    row "$(echo $sets)" "$here passed$([ $bad = 0 ] || echo ", $bad FAILED")" "$all8" "$all4" "$all16"
}

mkdir -p $work
make -s $(for m in $small; do echo build/$m-int4.mdr build/$m-bf16.mdr; done) > $work/make.log 2>&1 ||
    { tail -n 5 $work/make.log; exit 1; }
WINEDEBUG=-all WINEPREFIX=$PWD/$work/wine; export WINEDEBUG WINEPREFIX
while IFS='|' read -r name compiler runner; do
    case "$only|" in "|"|*"|$name|"*) try_target "$name" "$compiler" "$runner" < /dev/null;; esac
done <<EOF
$targets
EOF
echo "$table"
echo "$passed passed, $failed failed, $skipped skipped"
[ $failed = 0 ]
