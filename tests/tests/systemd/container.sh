#!/bin/sh
# Begins systemd as the first process of a container of its own: of what the host has, it sees the files, and changes none of them. Run in new namespaces of mounts,
# processes, control groups, network, host name and IPC. Needs: FOLDER (an empty folder), PROGRAMS and PACKAGING (folders to be seen below /srv/sepal).
set -eu
root=$FOLDER/root
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs "$FOLDER"
mkdir "$FOLDER/upper" "$FOLDER/work" "$root"
mount -t overlay -o "lowerdir=/,upperdir=$FOLDER/upper,workdir=$FOLDER/work" overlay "$root"
cd "$root"
mount -t proc proc proc
# Settings of the kernel are the host's, too.
mount --bind proc/sys proc/sys
mount -o remount,bind,ro proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs dev
device() {
    mknod -m 666 "dev/$1" c "$2" "$3"
}
device null 1 3
device zero 1 5
device full 1 7
device random 1 8
device urandom 1 9
device tty 5 0
device kvm 10 232
mkdir dev/pts dev/shm dev/net
device net/tun 10 200
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
mount -t tmpfs -o mode=1777 tmpfs dev/shm
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mkdir -p srv/sepal/programs srv/sepal/packaging
mount --bind "$PROGRAMS" srv/sepal/programs
mount --bind "$PACKAGING" srv/sepal/packaging
for program in guest guest-manager sepal-keeper vmm-component; do
    ln -s "programs/$program" "srv/sepal/$program"
done
# Nothing of what this host starts at its own boot.
cat > etc/systemd/system/sepal-test.target <<'UNIT'
[Unit]
Description=Test of Sepal's units
Requires=basic.target
After=basic.target
AllowIsolate=yes
UNIT
rm -rf var/log/journal
pivot_root . mnt
umount -l /mnt
echo "container made"
export container=sepal-test
exec "$SYSTEMD" --system --unit=sepal-test.target --log-target=journal --show-status=no
