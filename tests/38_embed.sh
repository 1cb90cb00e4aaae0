#!/bin/sh
# 38_embed.sh BIN BUILD: what a program notices that includes medrun.c, or is linked with it: no
# option, warning or macro of medrun.c reaches its own code, and arithmetic that would give other
# numbers is refused, when compiling as when running.
build=$(cd "$2" && pwd)
cc=${CC:-cc}
. tests/script.sh
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
unset CFLAGS

refused() { # OPTION: does not compile, and says why
    $cc "$1" -w -fsyntax-only -DMEDRUN_NO_MAIN medrun.c 2>"$T/log" && bad "$1 is not refused" && return
    check "$1: $(head -n 3 "$T/log")" grep -q 'cannot be built with -ffast-math' "$T/log"
}
refused -ffast-math; refused -Ofast; refused -ffinite-math-only
check '-O3 is not refused' $cc -O3 -w -fsyntax-only -DMEDRUN_NO_MAIN -DMEDRUN_SCALAR medrun.c

# A gcc that is older than the assembler's `{vex}` gets no such line, and still a whole file.
case $($cc -dumpmachine) in
    x86_64*|amd64*)
        $cc -U__clang__ -U__GNUC__ -D__GNUC__=10 -w -E -DMEDRUN_NO_MAIN medrun.c >"$T/old.i"
        check "an old gcc's assembler is spared {vex}" [ "$(grep -c '%{vex%}' "$T/old.i")" = 0 ]
        check "but AVX2 is there" grep -q kernel_row_avx2 "$T/old.i"
        $cc -w -E -DMEDRUN_NO_MAIN medrun.c >"$T/new.i"
        check "a new one has it" grep -q '%{vex%}' "$T/new.i"
        ;;
    *) skip "old assemblers: asked for on x86-64 only";;
esac

# The macros that are left, of all that medrun.c itself defines anywhere.
left() { # OPTION...
    $cc -E -dD -w -I. "$@" "$T/host.c" | awk '
        /^# [0-9]/ { ours = $3 ~ /medrun\.c"/ }
        /^#define/ && ours { sub(/\(.*/, "", $2); print $2 }' | sort -u >"$T/names"
    { cat "$T/host.c"; sed 's/.*/#ifdef &\nLEFT "&"\n#endif/' "$T/names"; } >"$T/all.c"
    $cc -E -w -I. "$@" "$T/all.c" | sed -n 's/^LEFT "\(.*\)"/\1/p' |
        grep -vxE 'MEDRUN_.*|_GNU_SOURCE|_FILE_OFFSET_BITS'
}
printf '#define MEDRUN_NO_MAIN\n#include "medrun.c"\n' >"$T/host.c"
check "macros left: $(left | tr '\n' ' ')" [ -z "$(left)" ]
check "the macros were found: $(wc -l <"$T/names")" [ "$(wc -l <"$T/names")" -gt 90 ]
check "macros left of plain C: $(left -DMEDRUN_SCALAR | tr '\n' ' ')" [ -z "$(left -DMEDRUN_SCALAR)" ]

# A host's own product and sum become an fma exactly where they do without medrun.c, and it is warned
# of its own unused functions, not of those of medrun.c.
case $($cc -dumpmachine) in
    x86_64*|amd64*) fma=-mfma word=vfmadd;;
    aarch64*) fma= word=fmadd;;
    *) word=;;
esac
cat >"$T/plain.c" <<'EOF'
#ifndef __clang__
__attribute__((optimize("O2")))
#endif
double fused(double a, double b, double c) { return a * b + c; }
static void forgotten(void) {}
EOF
cat "$T/plain.c" >>"$T/host.c"
fused() { # FILE: how often an fma stands in the host's function
    # shellcheck disable=SC2086
    $cc -O0 -w $fma -DMEDRUN_SCALAR -I. -S -o - "$T/$1.c" | sed -n '/^_*fused:/,/[^a-z]ret/p' | grep -c $word
}
if [ -n "$word" ]; then
    alone=$(fused plain) with=$(fused host)
    check "fma of a host: $alone alone, $with with medrun.c" [ "$alone" = "$with" ]
else skip "fma of a host's own: not known for this processor"; fi
$cc -O0 -c -o "$T/host.o" -Wall -Wextra -DMEDRUN_SCALAR -I. "$T/host.c" 2>"$T/log"
check "warned of its own function: $(cat "$T/log")" grep -q "forgotten" "$T/log"
check "and of no other: $(cat "$T/log")" [ "$(grep -c 'warning:' "$T/log")" = 1 ]

# Linking with -ffast-math alone makes some systems start the program with tiny numbers taken for 0.
cat >"$T/fast.c" <<'EOF'
#include <float.h>
#include <stdio.h>
#define MEDRUN_API_ONLY
#include "medrun.c"
int main(void) {
    volatile float least = FLT_MIN, half = least / 2;
    medrun_model *m = NULL;
    medrun_error e = {0};
    int code = medrun_open(&m, "tools/demo/demo.mdr", NULL, &e);
    printf("%s %d %s\n", half == 0 ? "flushed" : "kept", code, e.text);
    medrun_close(m);
    return 0;
}
EOF
$cc -O0 -w -DMEDRUN_SCALAR -DMEDRUN_NO_MAIN -c -o "$T/medrun.o" medrun.c &&
    $cc -O0 -w -I. -c -o "$T/fast.o" "$T/fast.c" &&
    $cc -ffast-math -o "$T/fast" "$T/fast.o" "$T/medrun.o" -lm -lpthread && "$T/fast" >"$T/out"
case $(cat "$T/out") in
    "flushed 1 this program's arithmetic takes tiny numbers for zero"*|"kept 0 ") ok;;
    *) bad "linked with -ffast-math: $(cat "$T/out")";;
esac
finish
