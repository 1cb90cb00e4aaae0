#!/bin/sh
# class.sh BIN PAGES WORK OUT: one folder for a room without a network: programs of BIN, demo model,
# pages, exercises, and what is the teacher's alone in `teacher`. At most 30 MB.
set -eu
bin=$1 pages=$2 work=$3 out=$4
course=$(cd "$(dirname "$0")" && pwd)
root=$course/../..
case $out in ''|/) exit 2 ;; esac
rm -rf "$out"
mkdir -p "$out/bin" "$out/exercises" "$out/teacher"
for p in medrun medrun-explain medrun-eval medrun-lab medrun-serve medrun-export; do
    for exe in "$bin/$p" "$bin/$p.exe"; do
        if [ -e "$exe" ]; then
            cp "$exe" "$out/bin"
            [ -n "${STRIP:-}" ] && $STRIP "$out/bin/$(basename "$exe")"
        fi
    done
done
cp -p "$root/tools/demo/demo.mdr" "$root/LICENSE" "$out"
sh "$course/pages.sh" "$bin/medrun-explain" "$pages" "$out/demo.mdr" "$work" "$out"
cp -p "$root/medrun.c" "$course/Makefile" "$course/course.h" "$course/engine.c" "$course/harness.c" "$out/exercises"
for n in 01 02 03 04 05 06 07 08 09 10; do
    mkdir -p "$out/exercises/$n" "$out/teacher/$n"
    cp -p "$course/$n/exercise.c" "$course/$n/check.c" "$out/exercises/$n"
    cp -p "$course/teacher/$n/solution.c" "$course/teacher/$n/mistakes" "$out/teacher/$n"
done
cp -p "$course/grade.sh" "$out/teacher"
(cd "$out" && find . -type f ! -name SHA256SUMS | LC_ALL=C sort | sed 's#^\./##' | xargs sha256sum > SHA256SUMS)
size=$(du -sk "$out" | cut -f1)
echo "$out: $((size / 1000)).$((size % 1000 / 100)) MB; open $out/index.html in a browser"
[ "$size" -le 30000 ]
