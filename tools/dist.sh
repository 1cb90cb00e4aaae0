#!/bin/sh
# dist.sh OUT: a release in the folder OUT: the source; static programs for Linux on x86-64 and
# arm64 and for Windows, each with README, licence and demo model; SHA256SUMS. All is made from the
# last commit in a folder of its own, so that the same compilers give the same bytes anywhere. What
# there is no compiler for is left out, and said.
set -eu
umask 022
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export TZ=UTC LC_ALL=C
date=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
version=medrun-$(git show HEAD:medrun.c | sed -n 's/^#define MEDRUN_VERSION "\(.*\)"/\1/p')
[ -z "$(git status --porcelain)" ] || echo "dist: what is not committed is left out" >&2
archives=

tarball() { # NAME: the folder of that name
    tar -C "$work" --format=ustar --sort=name --mtime="@$date" --owner=0 --group=0 \
        --numeric-owner -cf "$work/tar" "$1"
    gzip -9n < "$work/tar" > "$out/$1.tar.gz"
    archives="$archives $1.tar.gz"
}

zipball() {
    find "$work/$1" -exec touch -d "@$date" {} +
    rm -f "$out/$1.zip"
    (cd "$work" && find "$1" | sort | zip -q -9X "$out/$1.zip" -@)
    archives="$archives $1.zip"
}

programs() { # SYSTEM PACK COMPILER...: with the first compiler there is
    system=$1 pack=$2 name=$version-$1
    shift 2
    for cc in "$@"; do command -v "$cc" > /dev/null && break; done
    command -v "$cc" > /dev/null || { echo "dist: no $cc: no $system" >&2; return; }
    echo "$name: $cc" >&2
    exe='' link=-Wl,--build-id=none
    case $system in windows*) exe=.exe link=-Wl,--no-insert-timestamp ;; esac
    mkdir -p "$work/$name/tools/demo"
    od -An -v -tu1 "$work/$version/tools/serve_page.html" | sed 's/[0-9][0-9]*/&,/g' \
        > "$work/serve_page.inc"
    for source in medrun tools/export tools/eval tools/lab tools/explain $([ "$exe" ] || echo tools/serve); do
        (cd "$work/$version" && "$cc" ${CFLAGS:--O2} -static -s -ffile-prefix-map="$work"=. \
            -I"$work" $link -o "$work/program$exe" $source.c -lm -lpthread)
        program=medrun
        [ $source = medrun ] || program=medrun-${source#tools/}
        mv "$work/program$exe" "$work/$name/$program$exe"
    done
    cp "$work/$version/README.md" "$work/$version/LICENSE" "$work/$name"
    cp "$work/$version/tools/demo/demo.mdr" "$work/$name/tools/demo"
    $pack "$name"
}

git -c tar.umask=022 archive --prefix="$version/" HEAD | tar -C "$work" -xf -
tarball "$version"
[ "$(uname -m)" = x86_64 ] && musl=musl-gcc || musl=x86_64-linux-musl-gcc
programs linux-x86_64 tarball $musl x86_64-linux-gnu-gcc
programs linux-arm64 tarball aarch64-linux-gnu-gcc
programs windows-x86_64 zipball x86_64-w64-mingw32-gcc
# shellcheck disable=SC2086
(cd "$out" && sha256sum $archives > SHA256SUMS && cat SHA256SUMS)
