#!/bin/sh
# pages.sh EXPLAIN PAGES DEMO WORK OUT: the course's pages in OUT: for each lesson the page that
# medrun-explain writes, and the text with its numbers, which PAGES fills in; the teacher's page.
set -eu
explain=$1 pages=$2 demo=$3 work=$4 out=$5
course=$(dirname "$0")
mkdir -p "$work" "$out/teacher"
"$pages" "$demo" --coarser "$work/coarse.mdr"
for n in ${LESSONS:-01 02 03 04 05 06 07 08 09 10}; do
    compare=; [ $n = 03 ] && compare=$work/coarse.mdr
    "$explain" "$demo" --lesson ${n#0} ${compare:+--compare "$compare"} --neurons 12 -q --force -o "$out/explain-$n.html" \
        --json "$work/$n.json"
    chmod 644 "$out/explain-$n.html"
done
"$pages" "$demo" "$course" "$work" "$out"
