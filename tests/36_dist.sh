#!/bin/sh
# 36_dist.sh BIN BUILD: make dist twice gives the same bytes, and what is in them works. Built without
# optimization or kernels, to be done sooner.
build=$(cd "$2" && pwd)
. tests/script.sh
only_in_test_all "archives"
[ -e .git ] && git rev-parse -q --verify HEAD > /dev/null ||
    { skip "no git repository to make archives of"; finish; }
for tool in zip unzip tar gzip sha256sum; do
    command -v $tool > /dev/null || { skip "no $tool"; finish; }
done

rm -rf "$build/dist_a" "$build/dist_b"
for folder in dist_a dist_b; do
    CFLAGS="-O0 -DMEDRUN_SCALAR" sh tools/dist.sh "$build/$folder" > "$build/$folder.log" 2>&1 && ok ||
        { bad "dist.sh"; tail -5 "$build/$folder.log"; }
done
grep '^dist: no ' "$build/dist_a.log" | while read -r line; do echo "skipped: $line"; done
skipped=$((skipped + $(grep -c '^dist: no ' "$build/dist_a.log")))
for archive in "$build"/dist_a/*; do
    cmp "$archive" "$build/dist_b/$(basename "$archive")" && ok || bad "$archive changes"
done

cd "$build/dist_a" || exit
sha256sum --status -c SHA256SUMS && ok || bad "SHA256SUMS"
for archive in medrun-*.tar.gz; do tar xzf "$archive"; done
folder=$(sed -n '1s/.*  \(.*\)\.tar\.gz/\1/p' SHA256SUMS)
sh -c "cd $folder && ls Makefile tests/run.sh medrun.c tokenizer.bin" > /dev/null && ok || bad "source"
case $(uname -sm) in
"Linux x86_64") here=$folder-linux-x86_64 ;;
"Linux aarch64") here=$folder-linux-arm64 ;;
*) here= ;;
esac
if [ -d "$here" ]; then
    cd "$here" || exit
    found=$(env -i ./medrun run -q tools/demo/demo.mdr -p "What are the symptoms of diabetes?")
    case $found in *thirst*) ok ;; *) bad "the archive's program answers \"$found\"" ;; esac
    env -i ./medrun-export --help > /dev/null 2>&1 && ok || bad "the archive's exporter"
    env -i ./medrun-explain tools/demo/demo.mdr --lesson 2 -n 0 -q -o - | grep -q 'id="bin"' && ok || bad "the archive's explainer"
    grep -q "$build" medrun medrun-export && bad "a program names the folder of its build" || ok
else skip "no archive for this machine"
fi
finish
