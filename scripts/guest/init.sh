#!/bin/busybox sh
# First process of the test guest: brings up the devices, then serves commands on a virtio-serial port.
#
# Request:  "<id> <base64 of a shell script>\n". Reply: "<id> <exit code> <base64 of its stdout and stderr>\n".
# One request at a time; "0 0" announces that the guest is up. The port carries nothing else: kernel messages and
# noise go to the console, and a script's output cannot break the framing. When the host hangs up, the guest ends.

/bin/busybox --install -s
export PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /run
mount -t tmpfs tmpfs /dev/shm

[ -e /.root-disk ] || while read -r module; do
  insmod "/modules/$module.ko" || echo "init: insmod $module failed"
done </modules/order

# A guest that is to run from its first disk goes over to the file system there, which has this very script.
if grep -q strata.root /proc/cmdline && [ ! -e /.root-disk ]; then
  attempt=0
  while [ ! -b /dev/vda ] && [ $attempt -lt 300 ]; do
    attempt=$((attempt + 1))
    usleep 100000
  done
  mount -t ext4 /dev/vda /mnt || poweroff -f
  umount /dev/shm /tmp /dev /sys /proc
  exec switch_root /mnt /init
fi

port=
attempt=0
while [ -z "$port" ] && [ $attempt -lt 300 ]; do
  for entry in /sys/class/virtio-ports/*; do
    [ "$(cat "$entry/name" 2>/dev/null)" = strata.agent ] && port=/dev/${entry##*/}
  done
  attempt=$((attempt + 1))
  [ -n "$port" ] || usleep 100000
done
if [ -z "$port" ]; then
  echo "init: no agent port"
  poweroff -f
fi

exec 3<>"$port"
echo "0 0 " >&3
while read -r id script <&3; do
  echo "$script" | base64 -d >/tmp/.script
  # A new file for each request: a process left in the background keeps writing to the old one.
  rm -f /tmp/.output
  dash /tmp/.script >/tmp/.output 2>&1 </dev/null 3>&-
  code=$?
  { echo -n "$id $code "; base64 -w 0 /tmp/.output; echo; } >&3
done
poweroff -f
