#!/bin/busybox sh
# First process of the test guest. The kernel's own messages go to the first
# serial port (the console); the script under test has the second one for
# itself, so that no kernel line lands in the middle of its output.
export PATH=/usr/bin:/bin HOME=/
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
	insmod "/modules/$module" || echo "init: cannot load $module"
done </modules/order

# Raw, so that lines reach the host as they were written.
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1 2>&1

if [ -e /sys/class/net/eth0 ]; then
	ip link set lo up
	ip link set eth0 up
	ip addr add 10.0.2.15/24 dev eth0
	ip route add default via 10.0.2.2
fi

sh /script
echo "##guest-exit=$?##"
# The port is slow: what is still in it would be lost with the power.
stty -F /dev/ttyS1 raw -echo
poweroff -f
