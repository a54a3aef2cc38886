# In the guest, as root, without libraries: what an older kernel takes another way. Each part prints its result.
failed=0
part() { echo "--- $1 under $(uname -r), $(cut -d. -f1 /proc/uptime) s after boot"; }

container() (
    set -e
    mkdir -p /var/lib/b/rootfs/bin; cp /bin/busybox /var/lib/b/rootfs/bin/
    for applet in sh ls cat true sleep id; do ln -s busybox /var/lib/b/rootfs/bin/$applet; done
    cd /var/lib/b
    /payload/coracle spec
    sed -i 's/"terminal": true/"terminal": false/; s/"sh"/"sh", "-c", "id; cat \/proc\/1\/cgroup; ls \/dev"/' config.json
    /payload/coracle run first | grep 'uid=0'
    sed -i 's/id; cat .*\/dev/exec sleep 100/' config.json
    /payload/coracle create second
    /payload/coracle start second
    [ "$(/payload/coracle exec second sh -c 'echo inside')" = inside ]
    /payload/coracle kill second KILL
    /payload/coracle delete --force second
    [ "$(/payload/coracle list -q)" = "" ]
)

# A daemon, an imported image, a pod of two containers, its network, an exec, and nothing left.
pod() {
    CORACLED=/payload/coracled /payload/coracle-demo
}

for wanted in container pod; do
    part $wanted
    if $wanted; then echo "test result: ok. 1 passed; 0 failed"; else echo "test result: FAILED. 0 passed; 1 failed"; failed=1; fi
done
for program in /payload/unit/*; do
    part "${program##*/}"
    # With their output, which says what was skipped.
    $program --show-output || failed=1
done
echo "--- over after $(cut -d. -f1 /proc/uptime) s"
exit $failed
