package integration

import (
	"fmt"
	"net"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nbd-export/nbd-export/integration/guest"
)

const guestDiskSize = 128 * mib

// guestFill makes a file system on $disk and puts checksummed files on it. The
// two marked pauses let the host look at the image while a large file is there
// and after its blocks were given back.
const guestFill = `
set -e
mkfs.ext4 -q -F -b 4096 "$disk"
mount -t ext4 "$disk" /mnt
for i in 1 2 3 4 5 6; do
	dd if=/dev/urandom of=/mnt/file$i bs=64k count=$((i * 7)) 2>/dev/null
done
mkdir /mnt/many
for i in $(seq 200); do echo "small file $i" >/mnt/many/$i; done
dd if=/dev/urandom of=/mnt/large bs=1M count=24 2>/dev/null
(cd /mnt && sha256sum file* many/* >SUMS && sha256sum SUMS)
sync
echo WRITTEN; read go
rm /mnt/large
sync
fstrim -v /mnt
umount /mnt
echo TRIMMED; read go
`

// guestCheck is run on what guestFill left, after the disk went away and came
// back. SUMS itself is compared with what the first run printed, on the host.
const guestCheck = `
set -e
e2fsck -f -n "$disk"
mount -t ext4 "$disk" /mnt
(cd /mnt && sha256sum -c SUMS >/tmp/compared || { grep -v ': OK$' /tmp/compared; false; }; sha256sum SUMS)
touch /mnt/seen-again
umount /mnt
e2fsck -f -n "$disk"
`

// A guest's virtio disk is our export: it makes a file system, the guest and
// the exporter stop, both start anew, and everything is still there.
func TestGuestVirtioDisk(t *testing.T) {
	t.Parallel()
	image := sparseImage(t, t.TempDir(), guestDiskSize)
	drive := func(e *daemon) []string {
		return []string{
			"-blockdev", "driver=nbd,node-name=disk,discard=unmap,export=disk,server.type=unix,server.path=" + e.socket,
			"-device", "virtio-blk-pci,drive=disk",
		}
	}
	e := serveGuest(t, image, freePort(t))
	g := guest.Start(t, guest.Config{Script: "disk=/dev/vda\n" + guestFill, Args: drive(e)})
	driveFill(t, g, image)
	first := succeed(t, g.Wait())
	compareWithExport(t, image, e)
	e.stop()
	checkImage(t, image)

	e = serveGuest(t, image, freePort(t))
	second := succeed(t, guest.Run(t, guest.Config{Script: "disk=/dev/vda\n" + guestCheck, Args: drive(e)}))
	sameSums(t, first, second)
	compareWithExport(t, image, e)
	e.stop()
	checkImage(t, image)
}

// The kernel's own NBD client, set up by nbd-client, over TCP; with two
// connections the second time.
func TestGuestNBDClient(t *testing.T) {
	t.Parallel()
	testKernelClient(t, `
connect() {
	nbd-client 10.0.2.2 $port /dev/nbd0 -N disk -b 4096 -C $1
	wait_size
}
disconnect() { nbd-client -d /dev/nbd0; wait_gone; }
`)
}

// The same device with qemu-nbd between it and us: its image is our export.
func TestGuestQEMUNBDConnect(t *testing.T) {
	t.Parallel()
	testKernelClient(t, `
connect() {
	qemu-nbd --connect=/dev/nbd0 -f raw --discard=unmap nbd://10.0.2.2:$port/disk
	wait_size
}
disconnect() { qemu-nbd --disconnect /dev/nbd0; wait_gone; }
`)
}

// kernelClient is what both ways to attach /dev/nbd0 share. Attaching and
// detaching go on a little after the command has returned.
const kernelClient = `
wait_size() {
	for i in $(seq 100); do
		[ "$(cat /sys/block/nbd0/size)" != 0 ] && return
		sleep 0.1
	done
	echo "no size on /dev/nbd0"; dmesg | tail; exit 90
}
wait_gone() {
	for i in $(seq 100); do
		[ -e /sys/block/nbd0/pid ] || return 0
		sleep 0.1
	done
	echo "/dev/nbd0 stays connected"; exit 91
}
`

// blkdiscard comes last: it takes the front of the device away. That must read
// as zeroes, since our TRIM punches holes, and what follows must be untouched.
// Little is read, because an emulated processor is slow at checksums.
const guestDiscard = `
rest() { dd if=/dev/nbd0 bs=1M skip=16 count=8 2>/dev/null | sha256sum; }
before=$(rest)
blkdiscard -o 0 -l $((16 << 20)) /dev/nbd0
echo 3 >/proc/sys/vm/drop_caches
cmp -n $((16 << 20)) /dev/nbd0 /dev/zero
[ "$(rest)" = "$before" ]
`

func testKernelClient(t *testing.T, attach string) {
	image := sparseImage(t, t.TempDir(), guestDiskSize)
	port := freePort(t)
	e := serveGuest(t, image, port)
	script := "disk=/dev/nbd0\nport=" + port + "\n" + kernelClient + attach +
		"set -e\nconnect 1" + guestFill + "disconnect\n" +
		"connect 2" + guestCheck + "disconnect\n" +
		"echo CHECKED; read go\nconnect 1" + guestDiscard + "disconnect\n"
	g := guest.Start(t, guest.Config{Script: script, Network: true})
	driveFill(t, g, image)
	g.WaitFor("^CHECKED$", 0)
	compareWithExport(t, image, e)
	checkImage(t, image)
	used := allocated(t, image)
	g.Send("go")
	r := succeed(t, g.Wait())
	sums := sumsLine.FindAllString(r.Output, -1)
	if len(sums) != 2 || sums[0] != sums[1] {
		t.Errorf("checksums of the first and the second connection: %q", sums)
	}
	if now := allocated(t, image); now >= used {
		t.Errorf("blkdiscard freed nothing: image had %d bytes allocated, now %d", used, now)
	}
	e.stop()
}

// driveFill goes along with guestFill and checks that fstrim reached the image.
func driveFill(t *testing.T, g *guest.Guest, image string) {
	t.Helper()
	_, next := g.WaitFor("^WRITTEN$", 0)
	before := allocated(t, image)
	g.Send("go")
	g.WaitFor("^TRIMMED$", next)
	after := allocated(t, image)
	g.Send("go")
	if freed := before - after; freed < 20*mib {
		t.Errorf("removing a file of 24 MiB and fstrim freed %d bytes of the image (%d to %d)", freed, before, after)
	}
}

var sumsLine = regexp.MustCompile(`(?m)^[0-9a-f]{64}  SUMS$`)

func sameSums(t *testing.T, first, second guest.Result) {
	t.Helper()
	a, b := sumsLine.FindString(first.Output), sumsLine.FindString(second.Output)
	if a == "" || a != b {
		t.Errorf("checksums of the first boot: %q, of the second: %q", a, b)
	}
}

func succeed(t *testing.T, r guest.Result) guest.Result {
	t.Helper()
	if r.ExitCode != 0 {
		t.Fatalf("the guest's script ended with status %d; output:\n%s\nconsole:\n%s", r.ExitCode, r.Output, r.Console)
	}
	if strings.Contains(r.Console, "I/O error") {
		t.Errorf("the guest's kernel saw I/O errors:\n%s", r.Console)
	}
	t.Logf("guest ran for %v", r.Elapsed.Round(time.Millisecond))
	return r
}

func allocated(t *testing.T, image string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(image, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// checkImage has the host's e2fsck judge the file system in the image.
func checkImage(t *testing.T, image string) {
	t.Helper()
	need(t, "e2fsck", "e2fsprogs")
	run(t, "e2fsck", "-fn", image)
}

// compareWithExport compares the image file with what its exporter serves.
func compareWithExport(t *testing.T, image string, e *daemon) {
	t.Helper()
	need(t, "qemu-img", "qemu-utils")
	run(t, "qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", image, e.uri())
}

// serveGuest serves an image as "disk" on a Unix socket and on the port.
func serveGuest(t *testing.T, image, port string) *daemon {
	t.Helper()
	return serve(t, image, "-x", "disk", "-b", "127.0.0.1", "-p", port)
}

// freePort returns a TCP port of the loopback address that was free just now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(fmt.Errorf("no free port: %w", err))
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port)
}
