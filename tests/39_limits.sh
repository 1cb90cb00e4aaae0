#!/bin/sh
# 39_limits.sh BIN BUILD - what control groups leave a process, in both versions of their file system:
# files mounted over /sys/fs/cgroup in a mount namespace of the test's own.
. tests/script.sh
bin=$(cd "$1" && pwd) || exit 1
# Only root may, and a container may not.
if ! unshare -m sh -c 'mount --bind /tmp /sys/fs/cgroup && mount --bind /dev/null /proc/$$/cgroup' 2>/dev/null; then
    skip "control groups: cannot mount in a namespace of its own here"; finish
fi
T=$(mktemp -d) || exit 1
trap 'rm -rf "$T"' EXIT
line=$("$bin/medrun-lab" doctor | grep '^processors ')
all=$(echo "$line" | sed 's/^processors \([0-9]*\).*/\1/')

# FOLDER GROUPS PROGRAM...: runs it where FOLDER is the tree of groups, GROUPS the process's own
within() {
    folder=$1 groups=$2; shift 2
    printf "$groups" > "$T/self"
    unshare -m sh -c 'mount --bind "$0" /sys/fs/cgroup && mount --bind "$1" /proc/$$/cgroup && shift &&
                      exec "$@"' "$T/$folder" "$T/self" "$@" 2>&1
}
# WHAT PATTERN FOLDER GROUPS PROGRAM...
finds() {
    what=$1 pattern=$2; shift 2
    said=$(within "$@")
    case $said in *$pattern*) ok ;; *) bad "$what: wanted $pattern, found: $(echo "$said" | head -3)" ;; esac
}

mkdir -p "$T/two/pod/job" "$T/none" "$T/one/cpu,cpuacct/docker/x" "$T/one/memory"
echo "250000 100000" > "$T/two/cpu.max"
echo "max 100000" > "$T/two/pod/job/cpu.max"
echo "100000 100000" > "$T/two/pod/cpu.max"
echo 67108864 > "$T/two/pod/memory.max"
echo 60000000 > "$T/two/pod/memory.current"
printf 'anon 40000000\ninactive_file 12000000\nactive_file 8000000\n' > "$T/two/pod/memory.stat"
echo 199999 > "$T/one/cpu,cpuacct/docker/x/cpu.cfs_quota_us"
echo 100000 > "$T/one/cpu,cpuacct/docker/x/cpu.cfs_period_us"
echo -1 > "$T/one/cpu,cpuacct/cpu.cfs_quota_us"
echo 33554432 > "$T/one/memory/memory.limit_in_bytes"

lab=$bin/medrun-lab medrun=$bin/medrun demo=tools/demo/demo.mdr
v1='12:cpu,cpuacct:/docker/x\n3:memory:/not/seen/here\n1:name=systemd:/\n'
finds "no limit" "$line
" none '0::/\n' "$lab" doctor
if command -v taskset > /dev/null && [ "$all" -gt 1 ]; then
    first=$(taskset -cp $$ | sed 's/.*: \([0-9]*\).*/\1/')
    finds "affinity" "processors 1 (this process's affinity)" none '0::/\n' taskset -c "$first" "$lab" doctor
fi
finds "version 2, a group above" "processors 1 (the control group's quota)" two '0::/pod/job\n' "$lab" doctor
finds "version 2, memory" "memory     64.0 MB (the control group's limit), 25.9 MB are free" \
    two '0::/pod/job\n' "$lab" doctor
finds "version 1" "processors 1" one "$v1" "$lab" doctor
finds "version 1, memory" "memory     32.0 MB (the control group's limit)" one "$v1" "$lab" doctor
finds "show" "of 64.0 MB (the control group's limit); 25.9 MB are free: it fits" \
    two '0::/pod/job\n' "$medrun" show $demo
finds "show, threads" "threads      1 (the control group's quota)" two '0::/pod/job\n' "$medrun" show $demo
finds "run" "kernels, 1 thread, context" two '0::/pod/job\n' "$medrun" run $demo -p hi -n 1
# more threads than processors would only take turns
finds "-t 64" "kernels, $all thread" none '0::/\n' "$medrun" run $demo -p hi -n 1 -t 64
# the context follows the memory that is there
echo 12000000 > "$T/two/pod/memory.max"
echo 0 > "$T/two/pod/memory.current"
case $(within two '0::/pod\n' "$medrun" run $demo -p hi -n 1) in
    *"context 2048"*) bad "context: 2048 positions do not fit" ;; *" context "*) ok ;; *) bad "context" ;;
esac
finish
