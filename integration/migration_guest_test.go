package integration

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// The guest's disk: a file system, a ring of blocks behind it that the guest
// writes as such, and a part that the guest leaves to others.
const (
	migrateFileSystem = 32 * mib
	ringBlock         = 4 * kib
	ringBlocks        = 128
	ringOffset        = migrateFileSystem
	othersOffset      = ringOffset + mib
	othersSize        = 95 * mib
	migrateDisk       = othersOffset + othersSize

	// firstRecord has as many digits as every later number: one that lost a
	// digit on the serial line, where a migration cuts it, is none.
	firstRecord = 10000001
)

// migrateScript writes records until it is told to stop: into the ring and to
// the end of a file, each numbered, checksummed, synced and only then
// reported. The guest's memory knows what is in the file, too, and compares. A
// guest that boots again goes on behind the last record of the ring.
func migrateScript(last int) string {
	return fmt.Sprintf("disk=/dev/vda first=%d blocks=%d number=%d\n",
		ringOffset/ringBlock, ringBlocks, max(last+1, firstRecord)) + recordScript
}

const recordScript = `
nl='
'
record() { # KIND NUMBER: the record is $line
	echo "$1 $2" >/tmp/$1.text
	sum=$(sha256sum </tmp/$1.text)
	line="$1 $2 ${sum%% *}"
}
failed() { # KIND NUMBER
	echo "failed $1 $2: $(tail -n 1 /tmp/$1.err)"
	exit 1
}
raw() {
	while [ ! -e /tmp/stop ]; do
		record raw $number
		block=$line$nl
		for i in 1 2 3 4 5 6; do block=$block$block; done
		echo "$block" >/tmp/raw.block
		dd if=/tmp/raw.block of=$disk bs=4096 count=1 seek=$((first + number % blocks)) \
			conv=notrunc,fsync 2>/tmp/raw.err || failed raw $number
		echo "durable raw $number."
		number=$((number + 1))
	done
}
file() {
	if [ -e /mnt/records ]; then
		cp /mnt/records /tmp/file.said
		set -- $(tail -n 1 /mnt/records)
		number=$(($2 + 1))
	fi
	while [ ! -e /tmp/stop ]; do
		record file $number
		echo "$line" >/tmp/file.line
		dd if=/tmp/file.line of=/mnt/records bs=4096 oflag=append \
			conv=notrunc,fsync 2>/tmp/file.err || failed file $number
		cat /tmp/file.line >>/tmp/file.said
		echo "durable file $number."
		number=$((number + 1))
	done
}
mount -t ext4 $disk /mnt || exit 1
raw & raw=$!
file & file=$!
read order
touch /tmp/stop
wait $raw && wait $file || exit 2
echo 3 >/proc/sys/vm/drop_caches
cmp /tmp/file.said /mnt/records || exit 3
umount /mnt || exit 4
e2fsck -f -n $disk || exit 5
`

var recordKinds = []string{"raw", "file"}

// ledger is the last record of each kind that the guest has reported durable.
type ledger map[string]int

var durableLine = regexp.MustCompile(`(?m)^durable (raw|file) (\d{8})\.$`)

// note enters what a guest printed, and returns the first number of each kind
// in it.
func (l ledger) note(output string) ledger {
	first := ledger{}
	for _, m := range durableLine.FindAllStringSubmatch(output, -1) {
		n, _ := strconv.Atoi(m[2])
		l[m[1]] = max(l[m[1]], n)
		if first[m[1]] == 0 {
			first[m[1]] = n
		}
	}
	return first
}

// imageFormat is what the tests of migrations have to know of a format.
type imageFormat struct {
	name string // of nbd-export and of QEMU
	// volatile: what was not flushed is lost with an exporter that is killed.
	volatile bool
	// create makes an image in dir out of the raw one, which it may keep.
	create func(t testing.TB, dir, raw string) string
	// content is a raw file with what the image holds. Nobody writes to it
	// meanwhile.
	content func(t testing.TB, image string) string
	// check has the format's own tool judge an image that nobody owns, in which
	// clusters may be leaked.
	check func(t testing.TB, image string, leaks bool)
}

// imageFormats has a row for every format that a guest can migrate on.
var imageFormats = []imageFormat{
	{
		name:    "raw",
		create:  func(_ testing.TB, _, raw string) string { return raw },
		content: func(_ testing.TB, image string) string { return image },
		check:   func(testing.TB, string, bool) {},
	},
	{
		name:     "qcow2",
		volatile: true,
		create: func(t testing.TB, dir, raw string) string {
			image := filepath.Join(dir, "disk.qcow2")
			run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
			if err := os.Remove(raw); err != nil {
				t.Fatal(err)
			}
			return image
		},
		content: func(t testing.TB, image string) string {
			raw := filepath.Join(t.TempDir(), "content")
			run(t, "qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, raw) // it may have an owner
			return raw
		},
		check: func(t testing.TB, image string, leaks bool) { qcow2Tools("").check(t, image, !leaks) },
	},
}

// migrateImage makes the image that the guest's script expects.
func migrateImage(t testing.TB, f imageFormat, dir string) string {
	t.Helper()
	need(t, "mke2fs", "e2fsprogs")
	raw := sparseImage(t, dir, migrateDisk)
	run(t, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-J", "size=4",
		"-E", "lazy_itable_init=0,lazy_journal_init=0", raw, strconv.Itoa(migrateFileSystem/kib)+"k")
	return f.create(t, dir, raw)
}

// recordLine is the record as the guest makes it.
func recordLine(kind string, number int) string {
	return fmt.Sprintf("%s %d %x\n", kind, number, sha256.Sum256(fmt.Appendf(nil, "%s %d\n", kind, number)))
}

// checkRing requires every record of the ring that was reported durable, as
// far as no later one can have taken its place: the guest may be at the next,
// or at the one after it if a report was cut in two by a migration.
func checkRing(content string, said ledger) error {
	f, err := os.Open(content)
	if err != nil {
		return err
	}
	defer f.Close()
	last := said["raw"]
	got := make([]byte, ringBlock)
	var errs []error
	for n := max(firstRecord, last-ringBlocks+3); n <= last; n++ {
		if _, err := f.ReadAt(got, ringOffset+int64(n%ringBlocks)*ringBlock); err != nil {
			return err
		}
		line := recordLine("raw", n)
		if want := strings.Repeat(line, ringBlock/len(line)+1)[:ringBlock]; string(got) != want {
			at := 0
			for got[at] == want[at] {
				at++
			}
			errs = append(errs, fmt.Errorf("record raw %d was reported durable and is not there: from byte %d of its block on it is %.80q",
				n, at, got[at:]))
		}
	}
	return errors.Join(errs...)
}

// checkFiles requires that the file system is clean once its journal has been
// replayed, and that the file has every record reported durable, in order. It
// works on a copy.
func checkFiles(t testing.TB, content string, said ledger) error {
	t.Helper()
	need(t, "debugfs", "e2fsprogs")
	copied := filepath.Join(t.TempDir(), "fs")
	if err := copyHead(copied, content, migrateFileSystem); err != nil {
		return err
	}
	defer os.Remove(copied)
	// 1 says that there was something to replay.
	if r := tryRun(t, "e2fsck", "-y", "-E", "journal_only", copied); r.code > 1 {
		return fmt.Errorf("e2fsck, replaying the journal: exit status %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	run(t, "e2fsck", "-f", "-n", copied)
	records := []byte(run(t, "debugfs", "-R", "cat /records", copied))
	for n := firstRecord; n <= said["file"]; n++ {
		want := recordLine("file", n)
		if !bytes.HasPrefix(records, []byte(want)) {
			return fmt.Errorf("record file %d was reported durable and is not there, but %.100q", n, records)
		}
		records = records[len(want):]
	}
	if next := recordLine("file", said["file"]+1) + recordLine("file", said["file"]+2); !strings.HasPrefix(next, string(records)) {
		return fmt.Errorf("behind the last record reported durable, file %d, is something else than the next ones: %.200q", said["file"], records)
	}
	return nil
}

func copyHead(to, from string, n int64) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	_, err = io.CopyN(out, in, n)
	return errors.Join(err, out.Close())
}
