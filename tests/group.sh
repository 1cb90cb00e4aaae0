#!/bin/sh
# group.sh UNIT...: writes one program of several units that include medrun.c in the same way, so that
# it is compiled once. The program's name says whose main runs: test_05_numbers.
echo '#define MEDRUN_NO_MAIN'
echo '#define MEDRUN_MORE_KERNELS "tools/export_int4.h"'
echo '#include "medrun.c"'
echo '#include "tools/export_int4.c"'
echo '#include "tests/test.h"'
for unit; do
    echo "#define main main_$unit"
    echo "#line 1 \"tests/$unit.c\""
    sed -e '/^#include "\.\.\//s/.*//' -e '/^#include "test\.h"/s/.*//' \
        -e '/^#define MEDRUN_NO_MAIN$/s/.*//' -e '/^#define MEDRUN_MORE_KERNELS /s/.*//' "tests/$unit.c"
    echo '#undef main'
done
echo '#line 1 "tests/group.sh"'
echo 'int main(int argc, char **argv) {'
for unit; do echo "    if (argc && strstr(argv[0], \"test_$unit\")) return main_$unit();"; done
echo '    return printf("no such unit: %s\\n", argv[0]), 1;'
echo '}'
