#!/bin/sh
# size.sh BUILD: bytes of code (with constants), data and zeroed data of medrun.c, as a program and
# without its command line, by CC and by the cross compilers that are here.
mkdir -p "$1" || exit 1
printf '%-8s %-17s %8s %7s %7s\n' "" "" code data zeroed
for cc in "${CC:-cc}" aarch64-linux-gnu-gcc arm-linux-gnueabihf-gcc riscv64-linux-gnu-gcc; do
    command -v "$cc" > /dev/null || { echo "skipped: no $cc"; continue; }
    target=$("$cc" -dumpmachine)
    for flags in "" -DMEDRUN_NO_MAIN; do
        # shellcheck disable=SC2086
        "$cc" ${CFLAGS:--O2} $flags -c -o "$1/size.o" medrun.c || exit 1
        size "$1/size.o" | awk -v target="${target%%-*}" -v what="${flags:-program}" \
            'NR == 2 { printf "%-8s %-17s %8d %7d %7d\n", target, what, $1, $2, $3 }'
    done
done
rm -f "$1/size.o"
