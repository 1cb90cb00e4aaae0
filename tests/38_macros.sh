#!/bin/sh
# 38_macros.sh BIN BUILD: a program that includes medrun.c finds none of section 6's macros left. The
# names are read from the section, so a new one cannot be forgotten.
. tests/script.sh
cc=${CC:-cc} T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT

awk '/^ \* 6 Kernels:/ { on = 1 } /^ \* 7 Tensor:/ { on = 0 }
     on && /^#define / { sub(/\(.*/, "", $2); print $2 }' medrun.c | sort -u | grep -v '^MEDRUN_PASS$' \
    > "$T/names"
n=$(wc -l < "$T/names")
check "names were found: $n" [ "$n" -gt 90 ]
{
    echo '#define MEDRUN_NO_MAIN'
    echo '#include "medrun.c"'
    sed 's/.*/#ifdef &\n#error "left: &"\n#endif/' "$T/names"
} > "$T/all.c"
$cc -fsyntax-only -I. -w "$T/all.c" 2> "$T/err"
check "no macro is left: $(grep -o 'left: [^"]*' "$T/err" | head -5 | tr '\n' ' ')" [ ! -s "$T/err" ]
printf '#define K(x) x\n#ifdef K\n#error "left: K"\n#endif\n' > "$T/one.c"          # can it fail?
$cc -fsyntax-only "$T/one.c" 2> "$T/err" && bad "a macro that is left was not found" || ok
finish
