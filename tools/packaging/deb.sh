#!/bin/sh
# deb.sh OUT: packages for Debian in the folder OUT, from the files of this tree, by
# dpkg-buildpackage and debhelper. DEB_CFLAGS_SET="-O0" and the like choose how they are compiled.
set -eu
out=$(mkdir -p "$1" && cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/medrun"
git ls-files -z | tar -c --null -T - | tar -x -C "$work/medrun"
mv "$work/medrun/tools/packaging/debian" "$work/medrun/debian"
version=$(sed -n 's/^#define MEDRUN_VERSION "\(.*\)"/\1/p' medrun.c)
sed -i "1s/(.*)/($version)/" "$work/medrun/debian/changelog"
(cd "$work/medrun" && dpkg-buildpackage -b -us -uc) >&2
cp "$work"/*.deb "$out"
