#!/bin/bash
# Build the guest root image.  usage: mkroot.sh [-s suite] [-m modules-dir]... [-o vm/disk.img] [-p packages.txt]
#   -m DIR  a directory holding lib/modules/<release>/... of a kernel package (repeatable)
# Needs: mmdebstrap, mkfs.ext4 (e2fsprogs).  As root it uses mmdebstrap's root mode; without root its
# unshare mode (needs uidmap + subuid ranges), and the image is then filled by mkfs.ext4 -d under unshare.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
suite=bookworm out=vm/disk.img pk=$here/packages.txt size=4G mods=() mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)}
while getopts s:m:o:p:S: o; do case $o in s) suite=$OPTARG;; m) mods+=("$OPTARG");; o) out=$OPTARG;; p) pk=$OPTARG;; S) size=$OPTARG;; *) exit 2;; esac; done
mkdir -p "$(dirname "$out")"
inc=$(tr -s ' \n' ',,' <"$pk" | sed 's/^,*//;s/,*$//')
tar=$out.tar
[ -s "$tar" ] || mmdebstrap --variant=minbase --include="$inc" \
  --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
  --dpkgopt='path-exclude=/usr/share/locale/*' \
  --aptopt='Acquire::Languages "none"' \
  --customize-hook='chroot "$1" passwd -d root' \
  --customize-hook='echo vm >"$1/etc/hostname"; printf "127.0.0.1 localhost vm\n::1 localhost\n" >"$1/etc/hosts"; : >"$1/etc/fstab"' \
  --customize-hook="mkdir -p \"\$1/usr/local/sbin\"; cp $here/guest/vm-agent \"\$1/usr/local/sbin/\"; chmod 755 \"\$1/usr/local/sbin/vm-agent\"" \
  --customize-hook="cp $here/guest/vm-agent.service \"\$1/etc/systemd/system/\"; chroot \"\$1\" systemctl enable vm-agent.service" \
  --customize-hook='chroot "$1" systemctl disable docker-registry.service apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer 2>/dev/null || true' \
  --customize-hook='for u in getty@tty1 console-getty serial-getty@ttyS0 serial-getty@hvc0 systemd-networkd systemd-timesyncd systemd-update-utmp systemd-journal-flush systemd-random-seed systemd-pcrphase systemd-pcrphase-sysinit systemd-logind e2scrub_reap getty.target getty-static.service; do case $u in *.*) n=$u;; *) n=$u.service;; esac; ln -sf /dev/null "$1/etc/systemd/system/$n"; done' \
  --customize-hook='mkdir -p "$1/etc/systemd/journald.conf.d"; printf "[Journal]\nStorage=volatile\n" >"$1/etc/systemd/journald.conf.d/v.conf"; echo uninitialized >"$1/etc/machine-id"; rm -rf "$1/var/cache/apt" "$1/var/lib/apt/lists"/*' \
  --customize-hook='rm -f "$1/etc/resolv.conf"; echo nameserver 10.0.2.3 >"$1/etc/resolv.conf"' \
  "$suite" "$tar" "$mirror"
# image: unpack, add kernel modules, mkfs -d (no loop mount needed)
work=$(mktemp -d "$(dirname "$out")/rootXXXX"); trap 'rm -rf "$work"' EXIT
tar -C "$work" --xattrs --xattrs-include='*' --numeric-owner -xpf "$tar"
rm -rf "$work"/dev/*; mkdir -p "$work/mnt/share" "$work/usr/lib/modules"
for m in ${mods[@]+"${mods[@]}"}; do
  for d in "$m"/lib/modules/* "$m"/usr/lib/modules/*; do
    [ -d "$d" ] || continue; r=$(basename "$d"); rm -rf "$work/usr/lib/modules/$r"; cp -a "$d" "$work/usr/lib/modules/$r"
    rm -rf "$work/usr/lib/modules/$r/kernel"/{sound,drivers/{gpu,media,infiniband,iio,staging,scsi,usb,hwmon,input,isdn,mmc,mtd,ata,bluetooth,net/{ethernet,wireless,can,usb,phy}}}
    depmod -b "$work/usr" "$r" 2>/dev/null || depmod -b "$work" "$r"
  done
done
[ -z "${EXTRA_DIR:-}" ] || cp -a "$EXTRA_DIR"/. "$work"/
rm -f "$out"; truncate -s "$size" "$out"
mkfs.ext4 -q -F -O ^has_journal,^metadata_csum -E lazy_itable_init=1,nodiscard -m0 -d "$work" "$out"
ls -ls "$out"
